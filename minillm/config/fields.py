"""Fields of a configuration that are also flags: default, help text and allowed values of each."""

from argparse import ArgumentTypeError
from dataclasses import Field, field
from typing import Any, get_args

from minillm.errors import UsageError, parameter
from minillm.runtime import cli
from minillm.runtime.units import limits


def setting(default: Any, help: str, **rules: Any) -> Any:
    """Return a dataclass field that is also a flag.

    default: value where neither a preset, a file nor a flag gives one
    help: text for --help
    rules: metadata of the field:
        low, high: limits of a number, both allowed
        choices: the words that are allowed
        many: True if it takes one text or more, see `one_or_tuple`
        is_path: True if its text is a path; a ~ at its start is the home folder
        counts: True if its text may be a whole number, which Python code may give as a number
        parse: function from the flag's text to the value, in place of the type's own
        metavar: name of the value in --help
        group: title of its group in --help, and of the fields after it
        derived: where the value comes from if the default is not it, for --help
        resumable: True if --resume may change it
        prepares: True if it says how text is prepared
    """
    return field(default=default, metadata={"help": help, **rules})


def one_or_tuple(value: Any) -> Any:
    """Return the value of a setting that takes one text or more: a text, or a tuple of texts.

    value: a text, or a list as it comes from a command line or a file. Other values are returned
        unchanged.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
        return value
    return value[0] if len(value) == 1 else tuple(value)


def as_tuple(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the texts of such a setting as a tuple, which is empty for None."""
    return value if isinstance(value, tuple) else () if value is None else (value,)


def check_range(f: Field, value: Any) -> None:
    """Raise UsageError if a value is not of its field's type, or is not allowed by the field.

    f: field made by `setting`; a field without such metadata allows everything
    value: the value. A whole number is allowed for a float; True and False are not numbers.
    """
    rules, name = f.metadata, parameter(f.name)
    if not rules:
        return
    kinds = get_args(f.type) or (f.type,)
    if type(value) not in kinds and not (float in kinds and type(value) is int):
        raise UsageError(f"{name} {value!r} is a {type(value).__name__}, expected {_named(kinds)}")
    if value is None:
        return
    if "choices" in rules and value not in rules["choices"]:
        raise UsageError(f"{name} {value!r} is not one of {', '.join(rules['choices'])}")
    low, high = rules.get("low"), rules.get("high")
    if rules.get("above") and value == low:
        raise UsageError(f"{name} {value}: expected above {low:g}")
    if low is not None and not low <= value <= (high if high is not None else value):
        raise UsageError(f"{name} {value} is out of range; expected {limits(low, high)}")


def whole_or_auto(name: str, text: str, high: int) -> int | None:
    """Return the number that a text stands for, or None for "auto".

    name: name of the parameter, for the message
    text: the text
    high: largest allowed number; the smallest is 1

    Raises UsageError on any other text.
    """
    if text == "auto":
        return None
    try:
        return cli.whole(1, high)(text)
    except ArgumentTypeError as error:
        raise UsageError(f"{parameter(name)}: {error}, or auto") from None


def _named(kinds: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
