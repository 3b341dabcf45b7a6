"""Run the body of a program and turn errors into one line on standard error and an exit code."""

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

LINE = 500  # largest length of an error line; two long paths fit
HANGUP = 141  # 128 + SIGPIPE: the reader of our standard output has closed it


def one_line(text: str, limit: int = 300) -> str:
    """Return text as one printable line, with control characters escaped.

    text: the text
    limit: largest length. A longer text loses its middle, as its end says what to do.
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
    """Run `body(argv)`; print an error as `name: error: ...` and return the exit code.

    With `--debug` among the arguments the traceback is printed.

    name: name of the program
    body: the program
    argv: its arguments
    may_say: called with an error's text before it is printed, so that of several processes with
        the same error only one prints it
    """
    _repair_streams()
    try:
        try:
            with terminated_in_order():
                body(argv)
        finally:
            sys.stdout.flush()  # at exit a closed pipe would not raise BrokenPipeError
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
    """Print one line on standard error, if it can be written to.

    line: the line
    write: function that is called with the line and `file`
    Returns False if the reader has closed the pipe.
    """
    read = True
    try:
        write(line, file=sys.stderr)
        sys.stderr.flush()
    except OSError as error:  # EIO for a closed terminal
        read = not isinstance(error, BrokenPipeError)
    _give_up_full_streams()
    return read


def _give_up_full_streams() -> None:
    """Send unwritable output to the null device, so that Python does not retry it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _repair_streams() -> None:
    """Replace closed standard streams by the null device, and use UTF-8 for the others."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    terminal.use_utf8()


def _code(error: Exception) -> int:
    if isinstance(error, MinillmError):
        return error.code
    if machine_errors.advice(error):
        return 4
    if isinstance(error, OSError):  # an impossible name is wrong input
        return 2 if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else 5
    return 1


def _text(error: Exception) -> str:
    if isinstance(error, MinillmError):
        return error.with_flags()
    if found := machine_errors.advice(error):
        return f"{found[0]}; {found[1]}"
    if isinstance(error, OSError):
        name = error.filename  # text or bytes, or the number of a file descriptor
        name = os.fsdecode(name) if isinstance(name, bytes) else str(name or "")
        name = name if len(name) <= 120 else "..." + name[-117:]
        if error.errno == errno.ENOENT and not name:  # only the current folder has no name
            return "the folder that this was started in is gone; change to another"
        return f"{name}: {error.strerror}" if name else error.strerror or str(error)
    return str(error)
