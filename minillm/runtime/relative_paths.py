"""Paths as they stand in the files of a run: seen from the run's folder.

A run is given to others, who have nothing to do with the names of a user's folders, and it is moved
together with its text. So no absolute path is written. A path that has nothing but the root of the
file system in common with the run's folder is kept as its last name only.

A file states a path in proper characters. Where Python takes all text for ASCII, the path that it
opens has a surrogate for each other byte: `as_path` and `as_text` turn one into the other.
"""

import glob
import os
import sys
from pathlib import Path
from typing import Any

from minillm.runtime.terminal import decoded

# Settings that are paths. `tokenizer` may be one.
PATHS = ("data", "val", "init_from", "cache_dir", "tokenizer")
CACHE = "data/prepared"  # the default of `cache_dir`
NAMES = ("bpe", "char", "byte")  # values of `tokenizer` that are none


def stated(run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as a run's files state them.

    `out` and `overwrite` are left out: they were about the place of this run, not of the next one.
    """
    kept = {name: value for name, value in settings.items() if name not in ("out", "overwrite")}
    for name in kept.keys() & set(PATHS):
        kept[name] = _each(kept[name], lambda path: path_stated(run, path))
    if "cache_dir" in kept and _root_only(run, settings["cache_dir"]):
        kept["cache_dir"] = CACHE  # the default is as good a guess as the name of an unknown place
    return kept


def found(run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings that a run's files state with paths that can be opened from here."""
    moved = {
        n: _each(settings[n], lambda path: path_found(run, path)) for n in PATHS if n in settings
    }
    return settings | moved


def path_stated(run: Path, path: str) -> str:
    """Return a path as seen from the run's folder, or its last name."""
    if path in NAMES:
        return path
    target = Path(path).resolve()
    short = target.name if _root_only(run, path) else os.path.relpath(target, run.resolve())
    return as_text(short)


def path_found(run: Path, path: str) -> str:
    """Return where a path that a run's files state is.

    Earlier releases stated it as the user had typed it: absolute, or seen from the current folder.
    """
    path = as_path(path)
    if path in NAMES or Path(path).is_absolute():
        return path
    there = os.path.normpath(run.resolve() / path)
    if _exists(there) or (path.startswith(os.pardir) and not _exists(path)):
        return there
    return path


def as_path(text: str) -> str:
    """Return a path that a file states in the form in which it can be opened here.

    Raises UnicodeEncodeError if no path can have these characters.
    """
    try:
        os.fsencode(text)
        return text
    except UnicodeEncodeError:
        return os.fsdecode(text.encode("utf-8", sys.getfilesystemencodeerrors()))


def as_text(value: Any) -> Any:
    """Return the value of a setting in the form in which a file states it."""
    return _each(value, decoded)


def equal(name: str, one: Any, other: Any) -> bool:
    """Return whether two values of the setting `name` mean the same."""
    return one == other or (name in PATHS and same(one, other))


def same(one: Any, other: Any) -> bool:
    """Return whether two values of a setting that is a path name the same place."""
    return _each(one, os.path.realpath) == _each(other, os.path.realpath)


def _each(value: Any, change: Any) -> Any:
    """Change a path, or each of several."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_each(one, change) for one in value)
    return value


def _exists(path: str) -> bool:
    """Return whether there is something of that name, or that matches a pattern."""
    return os.path.lexists(path) or any(glob.iglob(path))  # noqa: PTH207


def _root_only(run: Path, path: str) -> bool:
    """Return whether a path and the run have no folder in common but the root, or not even that."""
    here, there = run.resolve(), Path(path).resolve()
    return here.anchor != there.anchor or here.parts[1:2] != there.parts[1:2]
