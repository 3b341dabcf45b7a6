"""A field of a configuration that is also a flag: its default, its help, and what it allows."""

from dataclasses import Field, field
from typing import Any

from minillm.errors import UsageError


def setting(default: Any, help: str, **rules: Any) -> Any:
    """A dataclass field that is also a flag: default, help, and `low`, `high` or `choices`."""
    return field(default=default, metadata={"help": help, **rules})


def check_range(f: Field, value: Any) -> None:
    """Raise UsageError if a field's value is outside what its `setting` allows."""
    rules, flag = f.metadata, "--" + f.name.replace("_", "-")
    if value is None or not rules:
        return
    if "choices" in rules and value not in rules["choices"]:
        raise UsageError(f"{flag} {value!r} is not one of {', '.join(rules['choices'])}")
    low, high = rules.get("low"), rules.get("high")
    if low is not None and not low <= value <= (high if high is not None else value):
        span = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        raise UsageError(f"{flag} {value} is out of range; expected {span}")
