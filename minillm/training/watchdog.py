"""Watchdog: record signals that ask a run to stop, and end the process if it hangs.

    signal to stop     The first one is noted; the loop saves and ends. The second one ends the
                       process at once, even inside a call of C, with code 128 + signal. The signals
                       are SIGINT and signals.ENDING: SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU.
    no sign of life    The stacks of all threads are printed, and the process ends with code 7.

One thread does both. It counts its own ticks instead of reading a clock: a process that was stopped
(Ctrl-Z, a sleeping laptop) and continued has not been silent.
"""

import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from minillm.distributed.ranks import Ranks
from minillm.runtime.signals import ENDING, take_signals

SIGNALS = (signal.SIGINT, *ENDING)
TICK_S = 1.0
LEAST_S, TIMES = 60.0, 5  # silence is allowed for LEAST_S, or TIMES the longest step
START, BRIEF = 5, 10  # the first START steps may take BRIEF times longer: kernels are compiled
ECHO_S = 1.0  # seconds in which a launcher passes on a signal that all processes already have
SAVING = 30  # a checkpoint may take this many times longer: disks may be slow


class Stopped(Exception):  # noqa: N818 - it is a request, not an error
    """Request to end the run. signal: number of the signal that asked for it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Watchdog:
    """Context manager that records signals and aborts the process if it stops making progress.

    In threads other than the main one Python delivers no signals. Signals that were ignored before
    stay ignored.

    limit_s: seconds allowed without a sign of life; None: a multiple of the longest step
    step_s: estimated seconds per step, before one was timed
    say: prints that a signal is being obeyed

    signal: number of the first signal; 0: there was none
    """

    def __init__(
        self,
        limit_s: float | None = None,
        step_s: float = 0.0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.limit_s, self.signal, self.say = limit_s, 0, say
        self._silent, self._steps, self._longest, self._patience = 0.0, 0, step_s, 1
        self._since: float | None = None

    def __enter__(self) -> "Watchdog":
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._before = take_signals(SIGNALS, self._note)
        if self._before:
            self._fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *what: object) -> None:
        if self._before:
            signal.set_wakeup_fd(self._fd)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._sender.send(b"\0")  # 0 is no signal: it ends the thread
        self._thread.join()
        self._receiver.close()
        self._sender.close()

    def alive(self) -> None:
        """Give a sign of life."""
        self._silent = 0.0

    def step(self) -> None:
        """Give a sign of life: a step is done."""
        now = time.monotonic()
        if self._since is not None and self._steps > 1:  # the first includes what happens once
            self._longest = max(self._longest, now - self._since)
        self._since, self._steps = now, self._steps + 1
        self.alive()

    @contextmanager
    def elsewhere(self, patience: int = 1) -> Iterator[None]:
        """Keep the `with` block out of the step times; allow it `patience` times the silence."""
        self.alive()
        before, self._patience, start = self._patience, patience, time.monotonic()
        try:
            yield
        finally:
            self._patience = before
            if self._since is not None:
                self._since += time.monotonic() - start
            self.alive()

    def requested_signal(self, ranks: Ranks) -> int:
        """Return the signal that asked any rank to end, the same on all ranks; 0: none did."""
        return self.signal if ranks.size == 1 else -int(ranks.minimum(-self.signal))

    @property
    def limit(self) -> float:
        """Seconds of silence that are allowed now."""
        early = BRIEF if self._steps < START else 1
        if self.limit_s is not None:
            return self.limit_s * self._patience
        return max(LEAST_S, TIMES * self._longest) * early * self._patience

    def note_lost_reader(self) -> None:
        """Act as if SIGPIPE had been received: nothing reads our messages any longer."""
        self._note(getattr(signal, "SIGPIPE", signal.SIGTERM))

    def _note(self, number: int, frame: object = None) -> None:
        """Note a signal; the first one counts.

        Python calls this when it returns from C, the thread at once.
        """
        self.signal = self.signal or number

    def _announce(self, number: int) -> None:
        with suppress(OSError):
            name = signal.Signals(number).name
            self.say(f"{name}: saving as soon as the step is done; once more: leaving at once")

    def _run(self) -> None:
        first = None
        while True:
            readable, _, _ = select.select([self._receiver], [], [], min(TICK_S, self.limit / 4))
            if readable:
                for number in self._receiver.recv(64):
                    if number == 0:
                        return
                    if number in self._before:
                        now = time.monotonic()
                        first = now if first is None else first
                        if now > first + ECHO_S:
                            os._exit(128 + number)
                        self._note(number)
                        if now == first:
                            self._announce(number)
                continue
            self._silent += min(TICK_S, self.limit / 4)
            if self._silent > self.limit:
                _abort(self._silent)


def _abort(silent_s: float) -> None:
    """Print the stacks of all threads and end the process."""
    try:
        print(
            f"train.py: error: no sign of life for {silent_s:.0f} s (--hang-timeout); the stacks "
            "of all threads follow; continue with --resume",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    finally:  # standard error may be closed
        os._exit(7)
