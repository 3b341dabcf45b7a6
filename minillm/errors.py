"""Errors that a user can cause, each with the exit code its process ends with.

Code 1, a bug of ours, belongs to every error that is not named here. program.py turns errors into
exit codes.
"""

import re
import signal

PARAMETER = re.compile("\ufdd0([a-z0-9_]+)\ufdd1")  # two code points that stand for no character


def parameter(name: str) -> str:
    """Return the name of a parameter as the text of an error carries it.

    Python code reads it as it is, `top_k`; on the command line it is the flag, `--top-k`.

    name: a keyword argument or the field of a configuration, such as "top_k"
    """
    return f"\ufdd0{name}\ufdd1"


class MinillmError(Exception):
    """A refusal: one line that says what came, what was expected and what to do."""

    code = 1

    def __str__(self) -> str:
        """Return the text for a reader of Python code: parameters by their names."""
        return PARAMETER.sub(r"\1", super().__str__())

    def with_flags(self) -> str:
        """Return the text for a reader of the command line: parameters as flags."""
        return PARAMETER.sub(lambda m: "--" + m[1].replace("_", "-"), super().__str__())


class UsageError(MinillmError, ValueError):
    """Wrong usage, input or configuration."""

    code = 2


class CorruptError(MinillmError):
    """A file is damaged, or does not belong, and nothing good is left to fall back to."""

    code = 3


class UnavailableError(MinillmError):
    """The environment lacks something: a device, memory, an optional package."""

    code = 4


class DivergedError(MinillmError):
    """The numbers of a model, or of its training, went non-finite."""

    code = 6


class PeerLostError(MinillmError):
    """Another process of the launch is gone, or does not answer."""

    code = 7


class Terminated(BaseException):
    """A signal of ENDING has come: no Exception, so that nothing but program.run catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number
