"""Run the body of a program: an error becomes one line on standard error, and an exit code."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from minillm.errors import MinillmError, Terminated
from minillm.runtime import machine_errors, terminal
from minillm.runtime.signals import terminated_in_order

LINE = 500  # characters of an error line; two long paths fit
HANGUP = 141  # 128 + SIGPIPE: the reader of our standard output went away


def one_line(text: str, limit: int = 300) -> str:
    """`text` on one printable line of at most `limit` characters (control characters escaped).

    What is too long loses its middle: at the end stands what to do.
    """
    line = " ".join(terminal.decoded(text).split("\n"))
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return line if len(line) <= limit else line[: limit // 2 - 3] + "..." + line[-limit // 2 :]


def run(
    name: str,
    body: Callable[[Sequence[str]], None],
    argv: Sequence[str],
    may_say: Callable[[str], bool] = lambda text: True,
) -> int:
    """Run `body(argv)`; print a refusal as `name: error: ...` and return the exit code.

    `--debug` among the arguments lets every traceback through.    may_say: asked before a refusal
    is printed, so that of several processes with the same refusal only one prints it.
    """
    _mend_streams()
    try:
        try:
            with terminated_in_order():
                body(argv)
        finally:
            sys.stdout.flush()  # at exit a reader that went away would be no BrokenPipeError
        return 0
    except SystemExit as stop:  # argparse: --help is 0, wrong usage is 2
        code = stop.code or 0
        return code if isinstance(code, int) else 2
    except KeyboardInterrupt:
        complain(f"\n{name}: interrupted")
        return 130
    except Terminated as end:
        how = "terminated" if end.signal == signal.SIGTERM else f"ended by {end}"
        complain(f"{name}: {how}")
        return 128 + end.signal
    except BrokenPipeError:
        _give_up_full_streams()
        return HANGUP
    except Exception as error:
        code = _code(error)
        if code == 1:
            complain(f"{name}: this is a bug in minillm; please report what follows")
        if code == 1 or "--debug" in argv:
            traceback.print_exc()
            return code
        text = one_line(_text(error), LINE - len(f"{name}: error: "))
        if may_say(text):
            complain(f"{name}: error: {text}")
        return code


def complain(line: str, write: Callable[..., None] = print) -> bool:
    """Print one line on standard error, as far as that can be written to.

    write: called with the line and `file`.
    Return False if it has no reader any longer: the other end of the pipe has been closed.
    """
    read = True
    try:
        write(line, file=sys.stderr)
        sys.stderr.flush()
    except OSError as error:  # of a terminal that was closed: EIO
        read = not isinstance(error, BrokenPipeError)
    _give_up_full_streams()
    return read


def _give_up_full_streams() -> None:
    """What cannot be written goes nowhere: Python would try again at exit, and complain itself."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _mend_streams() -> None:
    """Closed standard streams become the null device; the others read and write UTF-8."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    terminal.use_utf8()


def _code(error: Exception) -> int:
    if isinstance(error, MinillmError):
        return error.code
    if machine_errors.advice(error):
        return 4
    if isinstance(error, OSError):  # a name that none can have is wrong input
        return 2 if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else 5
    return 1


def _text(error: Exception) -> str:
    if isinstance(error, MinillmError):
        return error.with_flags()
    if found := machine_errors.advice(error):
        return f"{found[0]}; {found[1]}"
    if isinstance(error, OSError):
        name = error.filename  # text or bytes; of a bare file descriptor a number
        name = os.fsdecode(name) if isinstance(name, bytes) else str(name or "")
        name = name if len(name) <= 120 else "..." + name[-117:]
        if error.errno == errno.ENOENT and not name:  # only the current folder has no name
            return "the folder that this was started in is gone; change to another"
        return f"{name}: {error.strerror}" if name else error.strerror or str(error)
    return str(error)
