"""A strict argparse parser for all command lines, and parsers of values.

Abbreviations are refused, the message on an unknown flag names the nearest known one, underscores
in a flag stand for dashes, and numbers must be finite.
"""

import argparse
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from minillm import __version__
from minillm.errors import UsageError, parameter
from minillm.runtime import help_text
from minillm.runtime.units import limits

LONGEST = 1e9  # seconds: 32 years
# No flag begins with a digit, so such words are values.
NEGATIVE = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises UsageError with one line, which names the nearest known flag.

    A value that begins with a dash is written --flag=-value. Negative numbers do not need the `=`.

    aliases: other names of flags, {"--block-size": "--seq-len"}
    common: dests of the flags that --help shows, while --help all shows all; default: all
    examples: (command line, description) of each example in --help
    values: function from the other flags on the command line (None if there are none, or they are
        refused) to a sentence about the defaults and the note on each flag's value by dest
    """

    def __init__(
        self,
        *args: Any,
        aliases: dict[str, str] | None = None,
        common: Sequence[str] = (),
        examples: Sequence[tuple[str, str]] = (),
        values: Callable[[argparse.Namespace | None], tuple[str, dict[str, str]]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.aliases, self.common, self.examples = aliases or {}, common, examples
        self.values = values or (lambda namespace: ("", {}))
        self._given: list[str] = []  # the command line as it was typed
        self._words: list[str] = []  # the same words, each known flag as it is declared
        super().__init__(*args, allow_abbrev=False, add_help=False, **kwargs)
        self._negative_number_matcher = NEGATIVE
        what = "show the common flags, or all of them" if common else "show this help"
        self.add_argument("-h", "--help", nargs="?", const="", metavar="all", help=what)
        self.add_argument("--version", action="version", version=f"minillm {__version__}",
                          help="print the version")  # fmt: skip
        self.add_argument("--debug", action="store_true", help="show the tracebacks of errors")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Return the parsed command line; raise UsageError on any word that is not understood."""
        self._given = list(argv)
        words = self._words = self._spelled(argv)
        at = next((i for i, word in enumerate(words) if self._asks_for_help(i, word)), None)
        if at is not None:
            self._show_help(words, at)
        namespace, unknown = self.parse_known_args(words)
        if namespace.help is not None:  # -hx, for argparse
            raise UsageError(f"-h{namespace.help}: expected -h, or -h all")
        self._refuse_repeats(words)
        if unknown:
            raise UsageError(self._about_unknown(unknown[0]))
        del namespace.help
        return namespace

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, where argparse prints the whole usage and exits."""
        message = message.replace("ignored explicit argument", "takes no value; got")
        lacking = re.match(r"argument (?:\S+/)?(--\S+): expected (?:one|at least one) arg", message)
        if lacking and (value := self._after(lacking[1])):
            raise UsageError(
                f"{message}; a value that begins with a dash is written "
                f"{lacking[1]}={shlex.quote(value)}"
            )
        raise UsageError(message if message.endswith("?") else f"{message}; see --help")

    def format_help(self) -> str:
        """Return the help on all flags."""
        return help_text.whole(self, None)

    def _spelled(self, argv: Sequence[str]) -> list[str]:
        """Replace each known flag by its declared spelling; other words are unchanged."""
        words = list(argv)
        end = words.index("--") if "--" in words else len(words)
        for i, word in enumerate(words[:end]):
            flag, equals, value = word.partition("=")
            if self._declared(flag) in self._option_string_actions:
                words[i] = self._declared(flag) + equals + value
        return words

    def _declared(self, flag: str) -> str:
        if not flag.startswith("--"):
            return flag
        flag = flag.replace("_", "-")
        return self.aliases.get(flag, flag)

    def _actions_of(self, words: Sequence[str]) -> Iterator[tuple[str, argparse.Action]]:
        """Yield the flags among the words, each with its action."""
        for word in words:
            if word == "--":
                return
            flag = word.partition("=")[0]
            if flag in self._option_string_actions:
                yield flag, self._option_string_actions[flag]

    def _after(self, flag: str) -> str | None:
        """Return the word after `flag`, as it was typed, if it begins with a dash."""
        pairs = zip(self._words, self._given[1:], strict=False)
        return next((b for a, b in pairs if a == flag and b.startswith("-") and b != "--"), None)

    def _asks_for_help(self, at: int, word: str) -> bool:
        if "--" in self._words[:at] or word.partition("=")[0] not in ("-h", "--help"):
            return False
        before = self._option_string_actions.get(self._words[at - 1]) if at else None
        return before is None or before.nargs in (0, "?")

    def _show_help(self, words: list[str], at: int) -> NoReturn:
        """Print the help and exit. The other flags decide which values it shows."""
        _, equals, how = words[at].partition("=")
        rest = words[:at] + words[at + 1 :]
        if not equals and words[at + 1 : at + 2] == ["all"]:
            how, rest = "all", words[:at] + words[at + 2 :]
        if how not in ("", "all"):
            raise UsageError(f"--help {how!r}: expected --help, or --help all")
        refusal = ""
        try:
            namespace, _ = self.parse_known_args(rest)
        except UsageError as error:
            namespace, refusal = None, error.with_flags().removesuffix("; see --help")
        show = help_text.whole if how or not self.common else help_text.short
        print(show(self, namespace, refusal), end="")
        raise SystemExit(0)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # argparse would drop the value of --flag=-- as if it were the end of the flags.
        if action.option_strings and action.nargs in (None, "?") and arg_strings == ["--"]:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, not_one_of(value, action.choices))

    def _refuse_repeats(self, words: Sequence[str]) -> None:
        seen: set[str] = set()
        for flag, action in self._actions_of(words):
            if isinstance(action, argparse._AppendAction):
                continue
            if action.dest in seen:
                raise UsageError(f"{flag} is given twice; give it once")
            seen.add(action.dest)

    def _about_unknown(self, word: str) -> str:
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            return f"unexpected argument {word!r}; each value stands behind its flag, see --help"
        if flag.startswith("--"):
            flag = flag.replace("_", "-")
        known = [f for f in (*self._option_string_actions, *self.aliases) if f.startswith("--")]
        if near := nearest(flag.lstrip("-"), [name[2:] for name in known]):
            return f"unknown flag {flag}; did you mean --{near}?"
        # Abbreviations are refused: a future flag could begin in the same way.
        longer = [name for name in known if name[2:].startswith(flag.lstrip("-") or "-")]
        if 0 < len(longer) <= 3:
            return f"unknown flag {flag}; flags that begin so: {', '.join(longer)}"
        return f"unknown flag {flag}; see --help all"


def not_one_of(word: str, names: Iterable[str]) -> str:
    """Return the message on a wrong word, with the name that was probably meant.

    word: the word
    names: the allowed words
    """
    near = nearest(word, names)
    hint = f"; did you mean {near}?" if near else ""
    return f"{word!r} is not one of {', '.join(names)}{hint}"


def nearest(word: str, names: Iterable[str]) -> str | None:
    """Return the name that was probably meant by a misspelt word, or None.

    It is the closest name at a distance of at most two edits, or one edit for a word of one or two
    letters.

    word: the word
    names: the names to compare it with
    """
    limit = 2 if len(word) > 2 else 1
    near = [(edits(word, name), name) for name in names if abs(len(name) - len(word)) <= limit]
    distance, name = min(near, key=lambda pair: pair[0], default=(limit + 1, ""))
    return name if distance <= limit else None


def edits(a: str, b: str) -> int:
    """Return the number of letters to insert, delete, change or swap to turn one word into another.

    a, b: the words
    Source: Damerau 1964, "A technique for computer detection and correction of spelling errors".
    """
    before, row = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        longer = [i]
        for j, y in enumerate(b, 1):
            cost = min(row[j] + 1, longer[j - 1] + 1, row[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            longer.append(cost)
        before, row = row, longer
    return row[-1]


def whole(low: int, high: int | None = None):
    """Return a parser of whole numbers.

    low: smallest allowed number
    high: largest allowed number, or None for no limit
    """

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        return _bounded(value, low, high)

    return parse


def real(low: float, high: float | None = None, *, above: bool = False, below: bool = False):
    """Return a parser of finite numbers.

    low: smallest allowed number
    high: largest allowed number, or None for no limit
    above: True if `low` itself is not allowed
    below: True if `high` itself is not allowed
    """

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


def path_text(text: str) -> str:
    """Return a path with the home folder in place of a `~` that the shell left, as in --out=~/run.

    As in a shell, `~name` is unchanged if there is no such user.
    """
    return os.path.expanduser(text)  # noqa: PTH111 - a Path would refuse such a name


def path(text: str) -> Path:
    """Return a path; raise ArgumentTypeError if it is empty or has a NUL."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    return Path(path_text(text))


def check_device(name: str) -> None:
    """Raise UsageError if this is no name of a device; torch finds out whether it exists."""
    if not re.fullmatch(r"auto|(cpu|cuda|mps)(:\d+)?", name):
        raise UsageError(
            f"{parameter('device')} {name!r} is not one of auto, cpu, cuda, cuda:N, mps"
        )


def duration(text: str) -> float:
    """Return the seconds of a duration: `90`, `90s`, `10m` or `1.5h`."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)", text.strip())
    seconds = match and float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
    if not seconds or seconds > LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 90s, 10m or 2h")
    return seconds


def _bounded(value, low, high):
    if value < low or (high is not None and value > high):
        raise argparse.ArgumentTypeError(f"{value} is out of range; expected {limits(low, high)}")
    return value
