"""What a long run must not miss: signals to end it, and its own standing still.

    signals that ask   the first is noted, for the loop to save and end; the second ends the process
    it to end          at once, code 128 + signal, whatever it is busy with. They are SIGINT and
                       signals.ENDING: SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU
    no sign of life    the stacks of all threads, and code 7

One thread sees to both. It counts its own ticks and no clock, so that a process that was stopped
(Ctrl-Z, a sleeping laptop) and goes on has not stood still.
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
LEAST_S, TIMES = 60.0, 5  # of silence: so long at least, and so many of the longest steps
START, EASY = 5, 10  # the first steps may take so many times longer: kernels are compiled
ECHO_S = 1.0  # in which whoever started us passes on a signal that was sent to all already
SAVING = 30  # and writing a checkpoint: disks may be slow


class Stopped(Exception):  # noqa: N818 - no error: somebody wanted it
    """The run was asked to end. signal: by which."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Watch:
    """Inside `with` signals are noted, and silence is not suffered.

    limit_s: seconds without a sign of life; None: as steps are long, and step_s is a guess at that.
    say: what tells that a signal is being obeyed.
    Signals are heard in the main thread alone: elsewhere there are none. Those that were ignored
    before stay ignored.
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

    def __enter__(self) -> "Watch":
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._before = take_signals(SIGNALS, self._note)
        if self._before:
            self._fd = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *what: object) -> None:
        if self._before:
            signal.set_wakeup_fd(self._fd)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._mouth.send(b"\0")  # no signal: the thread ends
        self._thread.join()
        self._ear.close()
        self._mouth.close()

    def alive(self) -> None:
        """A sign of life."""
        self._silent = 0.0

    def step(self) -> None:
        """A sign of life: a step is done."""
        now = time.monotonic()
        if self._since is not None and self._steps > 1:  # the first pays for what happens once
            self._longest = max(self._longest, now - self._since)
        self._since, self._steps = now, self._steps + 1
        self.alive()

    @contextmanager
    def elsewhere(self, patience: int = 1) -> Iterator[None]:
        """What is done inside is no part of a step; it may be `patience` times as silent."""
        self.alive()
        before, self._patience, start = self._patience, patience, time.monotonic()
        try:
            yield
        finally:
            self._patience = before
            if self._since is not None:
                self._since += time.monotonic() - start
            self.alive()

    def asked(self, ranks: Ranks) -> int:
        """The signal by which any rank was asked to end, on all ranks at once; 0: none was."""
        return self.signal if ranks.size == 1 else -int(ranks.minimum(-self.signal))

    @property
    def limit(self) -> float:
        """Seconds of silence that are suffered now."""
        early = EASY if self._steps < START else 1
        if self.limit_s is not None:
            return self.limit_s * self._patience
        return max(LEAST_S, TIMES * self._longest) * early * self._patience

    def note_lost_reader(self) -> None:
        """Note SIGPIPE, as if it had come: the reader of the messages is gone."""
        self._note(getattr(signal, "SIGPIPE", signal.SIGTERM))

    def _note(self, number: int, frame: object = None) -> None:
        """The first signal counts. Python comes here when it can, the thread at once."""
        self.signal = self.signal or number

    def _tell(self, number: int) -> None:
        with suppress(OSError):
            name = signal.Signals(number).name
            self.say(f"{name}: saving as soon as the step is done; once more: leaving at once")

    def _look(self) -> None:
        first = None
        while True:
            heard, _, _ = select.select([self._ear], [], [], min(TICK_S, self.limit / 4))
            if heard:
                for number in self._ear.recv(64):
                    if number == 0:
                        return
                    if number in self._before:
                        now = time.monotonic()
                        first = now if first is None else first
                        if now > first + ECHO_S:
                            os._exit(128 + number)
                        self._note(number)
                        if now == first:
                            self._tell(number)
                continue
            self._silent += min(TICK_S, self.limit / 4)
            if self._silent > self.limit:
                _give_up(self._silent)


def _give_up(silent_s: float) -> None:
    try:
        print(
            f"train.py: error: no sign of life for {silent_s:.0f} s (--hang-timeout); the stacks "
            "of all threads follow; go on with --resume",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    finally:  # nobody may be listening
        os._exit(7)
