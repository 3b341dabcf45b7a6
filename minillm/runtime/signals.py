"""Catch signals that ask this process to end, and restore their handlers."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from minillm.errors import Terminated

# Signals that ask a process to end, besides SIGINT, which Python turns into KeyboardInterrupt. A
# scheduler sends SIGUSR1, SIGUSR2 or SIGXCPU before it takes the machine away, and a terminal sends
# SIGHUP when it closes. SIGBREAK is a signal of Windows. Each system has some of them.
ENDING = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
    if hasattr(signal, name)
)


@contextmanager
def terminated_in_order() -> Iterator[None]:
    """Raise Terminated in the body on a signal of ENDING, so that its clean-up code runs."""

    def stop(number: int, frame: object) -> None:
        raise Terminated(number)

    before = take_signals(ENDING, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def take_signals(numbers: Sequence[int], handler: Callable[[int, object], None]) -> dict:
    """Set a handler for some signals; return their previous handlers by number.

    An ignored signal stays ignored: nohup ignores SIGHUP, and a shell ignores SIGINT for a job in
    the background. Only the main thread may set handlers; in others nothing is done.

    numbers: the signals
    handler: the handler, which is called with the signal's number and the stack frame
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in numbers}
    # None: the handler is not Python's, and could not be restored.
    taken = {n: h for n, h in found.items() if h not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, handler)
    return taken
