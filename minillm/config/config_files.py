"""Read files for --config: one flat table of settings, or the config.json of a run."""

import json
import tomllib
from argparse import ArgumentTypeError
from dataclasses import Field
from pathlib import Path
from typing import Any

from minillm.config.flags import ALIASES, kind_of, parser_of, setting_fields
from minillm.errors import UsageError, parameter
from minillm.runtime import relative_paths
from minillm.runtime.cli import nearest

NAMED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
# Settings in the config.json of a run that a repetition of the run must not take over.
ONE_RUN = ("out", "overwrite")


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a .toml or .json file, by name.

    The file is one flat table, whose names have dashes or underscores, or the config.json of a run.
    Raises UsageError, which names file and key, if a key is not a setting or its value is not of
    the setting's type.
    """
    raw = _parse_file(path)
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: expected one table of settings, got {type(raw).__name__}")
    if isinstance(raw.get("model"), dict) and isinstance(raw.get("train"), dict):
        raw = _settings_of_run(path.parent, raw)
    settings: dict[str, Any] = {}
    known = setting_fields()
    for key, value in raw.items():
        flag = "--" + key.replace("_", "-")
        name = ALIASES.get(flag, flag)[2:].replace("-", "_")
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near}?" if near else "train.py --print-config prints all of them"
            raise UsageError(f"{path}: unknown setting {key!r}; {hint}")
        if name in settings:
            raise UsageError(f"{path}: {name} is given twice")
        if value is not None:
            settings[name] = _typed(path, key, value, known[name])
    return settings


def _settings_of_run(run: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with which a new run repeats a run.

    The vocabulary size is the requested one. Results of the settings (versions, the chosen number
    of threads, the corpus) are left out, and so is the name of the run.

    run: folder of the run, which its paths are relative to
    raw: content of its config.json
    """
    settings = {**raw["model"], **relative_paths.found(run, raw["train"])}
    settings.pop("bos_id", None)
    for name in ONE_RUN:
        settings.pop(name, None)
    if "asked_vocab_size" in raw:
        settings["vocab_size"] = raw["asked_vocab_size"]
    return settings


def is_complete(settings: dict[str, Any]) -> bool:
    """Return whether a file has every setting, as --print-config and a run's config.json have.

    Settings whose default is None may be missing.
    """
    return all(name in settings for name, f in setting_fields().items() if _must_be_stated(name, f))


def _must_be_stated(name: str, f: Field) -> bool:
    return f.default is not None and name not in ONE_RUN


def _parse_file(path: Path) -> Any:
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise UsageError(f"{parameter('config')} {path}: {what}; expected a .toml or .json file")
    if path.stat().st_size > 1 << 20:
        raise UsageError(
            f"{parameter('config')} {path}: larger than 1 MiB; is this a configuration?"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".toml":
            return tomllib.loads(text)
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_refuse_repeats, parse_constant=_refuse_nan)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply") from None
    except ValueError as error:
        if "integer string conversion" in str(error):  # Python's own advice is of no use here
            raise UsageError(f"{path}: a number has too many digits") from None
        raise UsageError(f"{path}: {error}") from None
    raise UsageError(f"{parameter('config')} {path}: expected a .toml or .json file")


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return table


def _refuse_nan(text: str) -> None:
    raise ValueError(f"{text} is not a finite number")


def _typed(path: Path, key: str, value: Any, f: Field) -> Any:
    kind = kind_of(f)
    if f.metadata.get("many") and isinstance(value, list) and value:
        return tuple(_typed(path, key, part, f) for part in value)
    if f.name in ("threads", "micro_batch_size") and type(value) is int:
        value = str(value)
    if f.name == "time_limit" and type(value) in (int, float):
        value = str(value)
    fits = type(value) is kind or (kind is float and type(value) in (int, str) and (
        type(value) is int or "parse" in f.metadata))  # fmt: skip
    if not fits:
        raise UsageError(
            f"{path}: {key} = {json.dumps(value, default=str)} is a {type(value).__name__}, "
            f"expected {NAMED[kind]}"
        )
    if kind is str:
        value = _checked(path, key, value, "is_path" in f.metadata)
    if kind in (bool, str) and not f.metadata.keys() & {"choices", "is_path"}:
        return value
    try:
        return parser_of(f)(str(value))
    except ArgumentTypeError as error:
        raise UsageError(f"{path}: {key}: {error}") from None


def _checked(path: Path, key: str, text: str, is_path: bool) -> str:
    """Return the text of a setting; raise UsageError if it has a NUL or a lone surrogate.

    path: the file, for the message
    key: the setting's name in the file
    text: the text
    is_path: allow surrogates that stand for the bytes of a file name that is not UTF-8
    """
    try:
        text = relative_paths.as_path(text) if is_path else text
        text.encode("utf-8", "surrogateescape" if is_path else "strict")
        if "\0" not in text:
            return text
    except UnicodeEncodeError:
        pass
    raise UsageError(f"{path}: {key} holds a NUL or half a character")
