"""A field of a configuration that is also a flag: its default, its help, and what it allows."""

from dataclasses import Field, field
from typing import Any, get_args

from minillm.errors import UsageError, parameter
from minillm.runtime.units import limits


def setting(default: Any, help: str, **rules: Any) -> Any:
    """A dataclass field that is also a flag: default, help, and `low`, `high` or `choices`.

    many=True: it takes one text or more, see `several`.
    is_path=True: its text is a path, or each of them is; a ~ at its start is the home folder.
    """
    return field(default=default, metadata={"help": help, **rules})


def several(value: Any) -> Any:
    """Return the value of a setting that is one text or more: a text, or a tuple of them.

    value: a text, or a list as a command line or a file has it. Other values come back as they are.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
        return value
    return value[0] if len(value) == 1 else tuple(value)


def parts_of(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the texts of such a setting; none if it is None."""
    return value if isinstance(value, tuple) else () if value is None else (value,)


def check_range(f: Field, value: Any) -> None:
    """Raise UsageError if a field's value is not of its type, or outside what its `setting` allows.

    A whole number may stand for a float; True stands for no number.
    """
    rules, flag = f.metadata, parameter(f.name)
    if not rules:
        return
    kinds = get_args(f.type) or (f.type,)
    if type(value) not in kinds and not (float in kinds and type(value) is int):
        raise UsageError(f"{flag} {value!r} is a {type(value).__name__}, expected {_named(kinds)}")
    if value is None:
        return
    if "choices" in rules and value not in rules["choices"]:
        raise UsageError(f"{flag} {value!r} is not one of {', '.join(rules['choices'])}")
    low, high = rules.get("low"), rules.get("high")
    if rules.get("above") and value == low:
        raise UsageError(f"{flag} {value}: expected above {low:g}")
    if low is not None and not low <= value <= (high if high is not None else value):
        raise UsageError(f"{flag} {value} is out of range; expected {limits(low, high)}")


def _named(kinds: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
