"""Signals that ask this process to end, and how they are caught and given back."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from minillm.errors import Terminated

# Signals that ask a process to end; SIGINT is Python's own KeyboardInterrupt. A scheduler sends
# SIGUSR1, SIGUSR2 or SIGXCPU before it takes the machine away, a terminal SIGHUP when it closes.
# SIGBREAK is Windows'; each system has some of them.
ENDING = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
    if hasattr(signal, name)
)


@contextmanager
def terminated_in_order() -> Iterator[None]:
    """Inside, the signals of ENDING are exceptions as SIGINT is: what is half written is taken
    away.
    """

    def stop(number: int, frame: object) -> None:
        raise Terminated(number)

    before = take_signals(ENDING, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def take_signals(numbers: Sequence[int], handler: Callable[[int, object], None]) -> dict:
    """Set `handler` for these signals; return the handlers that they had before, by number.

    A signal that was being ignored stays ignored: nohup does that to SIGHUP, and a shell to SIGINT
    of a job in the background. Only the main thread may set handlers; elsewhere nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in numbers}
    # None: the handler is not Python's, and could not be put back.
    taken = {n: h for n, h in found.items() if h not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, handler)
    return taken
