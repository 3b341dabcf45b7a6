"""Command lines: a strict argparse, and flags made from the configuration dataclasses.

Strict means: no abbreviations, an unknown flag names the nearest known one, dashes and underscores
are one, and numbers must be finite. What this room does not do: know any particular flag.
"""

import argparse
import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from minillm import __version__
from minillm.errors import UsageError

LONGEST = 1e9  # seconds: 32 years


class HelpFormatter(argparse.HelpFormatter):
    """Adds the default to each flag's help, where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.help and action.default not in (None, False, argparse.SUPPRESS):
            return action.help + " (default: %(default)s)"
        return action.help


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses in one line, as UsageError, with the nearest known flag.

    aliases: other spellings of a flag, {"--block-size": "--seq-len"}.
    """

    def __init__(self, *args: Any, aliases: dict[str, str] | None = None, **kwargs: Any) -> None:
        self.aliases = aliases or {}
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        version = f"minillm {__version__}"
        self.add_argument("--version", action="version", version=version, help="print the version")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`; raise UsageError on anything that is not understood."""
        argv = [self._canonical(word) for word in argv]
        self._refuse_repeats(argv)
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            raise UsageError(self._about_unknown(unknown[0]))
        return namespace

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage and exiting."""
        message = message.replace("ignored explicit argument", "takes no value; got")
        raise UsageError(f"{message}; see --help")

    def _canonical(self, word: str) -> str:
        if not word.startswith("--") or word == "--":
            return word
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        return self.aliases.get(flag, flag) + equals + value

    def _refuse_repeats(self, argv: list[str]) -> None:
        seen: set[str] = set()
        for word in argv:
            if word == "--":
                return
            flag = word.partition("=")[0]
            action = self._option_string_actions.get(flag)
            if action is None or isinstance(action, argparse._AppendAction):
                continue
            if action.dest in seen:
                raise UsageError(f"{flag} is given twice; give it once")
            seen.add(action.dest)

    def _about_unknown(self, word: str) -> str:
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            return f"unexpected argument {word!r}; each value stands behind its flag, see --help"
        known = [f for f in (*self._option_string_actions, *self.aliases) if f.startswith("--")]
        if len(flag) == 2:  # -p
            near = [name for name in known if name.startswith(f"-{flag}")]
        else:
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; see --help"
        return f"unknown flag {flag}{hint}"


def whole(low: int, high: int | None = None):
    """A parser of whole numbers between `low` and `high`, both included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        return _bounded(value, low, high)

    return parse


def real(low: float, high: float | None = None, *, above: bool = False, below: bool = False):
    """A parser of finite numbers from `low` to `high`; `above`, `below` leave the ends out."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        if above and value == low:
            raise argparse.ArgumentTypeError(f"{text} is not above {low:g}")
        if below and value == high:
            raise argparse.ArgumentTypeError(f"{text} is not below {high:g}")
        return _bounded(value, low, high)

    return parse


def path(text: str) -> Path:
    """A path: neither empty, which would be the folder one stands in, nor with a NUL."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    return Path(text)


def duration(text: str) -> float:
    """Seconds from `90`, `90s`, `10m` or `1.5h`."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)", text.strip())
    seconds = match and float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
    if not seconds or seconds > LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 90s, 10m or 2h")
    return seconds


def _bounded(value, low, high):
    if value < low or (high is not None and value > high):
        span = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        raise argparse.ArgumentTypeError(f"{value} is out of range; expected {span}")
    return value
