"""Settings of a training as keyword arguments of Python, in place of a command line."""

from argparse import ArgumentTypeError, Namespace
from os import PathLike, fspath
from typing import Any

from minillm.config.flags import setting_fields
from minillm.errors import UsageError, parameter
from minillm.flags.train import NEWEST, check
from minillm.runtime.cli import nearest, not_one_of, path_text


def train_arguments(settings: dict[str, Any]) -> Namespace:
    """Return the arguments of train.py that these keywords stand for.

    settings: name -> value. The names are those of the flags, with underscores; None leaves a
        setting open. Paths may be pathlib's, and a duration is seconds or text such as "10m".
        resume=True is the newest run.

    Raises UsageError on an unknown name, with the nearest known one, on a value that cannot be, or
    if two settings do not fit together.
    """
    names = [*setting_fields(), "config", "resume"]
    if unknown := [name for name in settings if name not in names]:
        near = nearest(unknown[0], names)
        hint = f"did you mean {near}?" if near else "see train.py --help all for all settings"
        raise UsageError(f"{unknown[0]}: no such setting; {hint}")
    values = {name: _value(name, value) for name, value in settings.items()}
    args = Namespace(**{**dict.fromkeys(names), **values})
    check(args)
    return args


def _value(name: str, value: Any) -> Any:
    """Return the value as the command line's parser would give it."""
    if name == "resume" and isinstance(value, bool):
        return NEWEST if value else None
    field = setting_fields().get(name)
    rules = field.metadata if field else {"is_path": True}
    if rules.get("many") and value is not None:
        parts = value if isinstance(value, list | tuple) else [value]
        return [_path(part) for part in parts]
    if rules.get("is_path"):
        return _path(value)
    if "choices" in rules and value is not None and value not in rules["choices"]:
        raise UsageError(f"{parameter(name)}: {not_one_of(str(value), rules['choices'])}")
    if "parse" in rules and isinstance(value, str):
        try:
            return rules["parse"](value)
        except ArgumentTypeError as error:
            raise UsageError(f"{parameter(name)}: {error}") from None
    return value


def _path(value: Any) -> Any:
    """Return the text of a path, with the home folder for a ~ at its start."""
    value = fspath(value) if isinstance(value, PathLike) else value
    return path_text(value) if isinstance(value, str) else value
