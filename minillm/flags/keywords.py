"""Settings of a training as keyword arguments of Python, in place of a command line."""

from argparse import ArgumentTypeError, Namespace
from os import PathLike, fspath
from typing import Any

from minillm.config.fields import check_range
from minillm.config.flags import ALIASES, setting_fields
from minillm.errors import UsageError, parameter
from minillm.flags.train import NEWEST, check
from minillm.runtime.cli import nearest, not_one_of, path_text


def train_arguments(settings: dict[str, Any]) -> Namespace:
    """Return the arguments of train.py that these keywords stand for.

    settings: name -> value. The names are those of the flags and their aliases, with underscores;
        None leaves a setting open. Paths may be pathlib's, a duration is seconds or text such as
        "10m", and recurrent is a tuple or text. resume=True is the newest run.

    Raises UsageError on an unknown name, with the nearest known one, on a value that cannot be, or
    if two settings do not fit together.
    """
    names = [*setting_fields(), "config", "resume"]
    aliases = {_keyword(alias): _keyword(flag) for alias, flag in ALIASES.items()}
    values: dict[str, Any] = {}
    for given, value in settings.items():
        name = aliases.get(given, given)
        if name not in names:
            near = nearest(given, [*names, *aliases])
            hint = f"did you mean {near}?" if near else "see train.py --help all for all settings"
            raise UsageError(f"{given}: no such setting; {hint}")
        if name in values:
            both = [other for other in settings if aliases.get(other, other) == name]
            raise UsageError(f"{' and '.join(both)} are one setting; give one")
        values[name] = _value(name, value)
    args = Namespace(**{**dict.fromkeys(names), **values})
    check(args)
    return args


def _keyword(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _value(name: str, value: Any) -> Any:
    """Return the value as the command line's parser would give it."""
    if value is None:
        return None
    if name == "resume" and isinstance(value, bool):
        return NEWEST if value else None
    field = setting_fields().get(name)
    if field is None:
        return _path(name, value)
    rules = field.metadata
    if rules.get("many"):
        parts = value if isinstance(value, list | tuple) else [value]
        return [_path(name, part) for part in parts]
    if rules.get("is_path"):
        return _path(name, value)
    if "choices" in rules and value not in rules["choices"]:
        raise UsageError(f"{parameter(name)}: {not_one_of(str(value), rules['choices'])}")
    if "parse" in rules and not isinstance(value, bool):
        try:
            return rules["parse"](_text(value))
        except ArgumentTypeError as error:
            raise UsageError(f"{parameter(name)}: {error}") from None
    if rules.get("counts") and type(value) is int:
        value = str(value)
    check_range(field, value)
    return value


def _text(value: Any) -> str:
    """Return the text that stands for a number, or for a tuple of numbers, in a flag."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _path(name: str, value: Any) -> str:
    """Return the text of a path, with the home folder for a ~ at its start."""
    text = fspath(value) if isinstance(value, PathLike) else value
    if not isinstance(text, str):
        raise UsageError(f"{parameter(name)}: expected a path, got {type(value).__name__}")
    return path_text(text)
