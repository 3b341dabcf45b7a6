"""Errors that a user can cause, each with the exit code that the process ends with.

Every other exception is a bug and ends the process with code 1. runtime/program.py turns errors
into exit codes.
"""

import re
import signal

PARAMETER = re.compile("\ufdd0([a-z0-9_]+)\ufdd1")  # two code points that stand for no character


def parameter(name: str) -> str:
    """Return the name of a parameter, marked for use in the text of an error.

    Python code reads the name, `top_k`. The command line prints the flag, `--top-k`.

    name: a keyword argument or the field of a configuration, such as "top_k"
    """
    return f"\ufdd0{name}\ufdd1"


class MinillmError(Exception):
    """Base class of errors whose text is one line: the value, what is wrong, what to do."""

    code = 1

    def __init__(self, text: str = "") -> None:
        """Keep the text with its parameters marked; str, repr and args name them plainly.

        text: the line; `text` of the error, with the marks, can become part of another error's text
        """
        super().__init__(PARAMETER.sub(r"\1", text))
        self.text = text

    def with_flags(self) -> str:
        """Return the text with flags in place of parameters, for the command line."""
        return PARAMETER.sub(lambda m: "--" + m[1].replace("_", "-"), self.text)


class UsageError(MinillmError, ValueError):
    """Wrong usage, input or configuration."""

    code = 2


class CorruptError(MinillmError):
    """A file is damaged, or is not the right one, and there is no good file to fall back to."""

    code = 3


class UnavailableError(MinillmError):
    """The environment lacks something: a device, memory, an optional package."""

    code = 4


class DivergedError(MinillmError):
    """A loss, gradient, weight or logit is NaN or infinite."""

    code = 6


class PeerLostError(MinillmError):
    """Another rank has ended, or does not answer."""

    code = 7


class Terminated(BaseException):
    """The process received a signal of runtime/signals.ENDING.

    It is not an Exception, so that only program.run catches it.

    number: the signal's number
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number
