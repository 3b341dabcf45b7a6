"""Convert paths to the form that the files of a run have: relative to the run's folder.

A run may be given to other people, who should not see the names of a user's folders, and it may be
moved together with its text. So no absolute path is written. Of a path that shares only the root of
the file system with the run's folder, only the last name is written.

A file has paths in Unicode. Where Python takes all text for ASCII, a path has a surrogate for each
other byte; `as_path` and `as_text` convert one form to the other.
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
NAMES = ("bpe", "char", "byte")  # values of `tokenizer` that are not paths


def stated(run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings in the form of a run's files, without `out` and `overwrite`.

    Those two name the place of this run, and would be wrong for another.

    run: folder of the run
    settings: settings by name
    """
    kept = {name: value for name, value in settings.items() if name not in ("out", "overwrite")}
    for name in kept.keys() & set(PATHS):
        kept[name] = _each(kept[name], lambda path: path_stated(run, path))
    if "cache_dir" in kept and _root_only(run, settings["cache_dir"]):
        kept["cache_dir"] = CACHE  # its last name alone would be no better guess than the default
    return kept


def found(run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings from a run's files with paths that can be opened here.

    run: folder of the run
    settings: settings by name
    """
    moved = {
        n: _each(settings[n], lambda path: path_found(run, path)) for n in PATHS if n in settings
    }
    return settings | moved


def path_stated(run: Path, path: str) -> str:
    """Return a path relative to the run's folder, or its last name.

    run: folder of the run
    path: the path
    """
    if path in NAMES:
        return path
    target = Path(path).resolve()
    short = target.name if _root_only(run, path) else os.path.relpath(target, run.resolve())
    return as_text(short)


def path_found(run: Path, path: str) -> str:
    """Return a path from a run's files in a form that can be opened here.

    Earlier releases wrote it as the user typed it: absolute, or relative to the current folder.

    run: folder of the run
    path: the path in the run's file
    """
    path = as_path(path)
    if path in NAMES or Path(path).is_absolute():
        return path
    there = os.path.normpath(run.resolve() / path)
    if _exists(there) or (path.startswith(os.pardir) and not _exists(path)):
        return there
    return path


def as_path(text: str) -> str:
    """Return a path from a file in the form in which it can be opened here.

    Raises UnicodeEncodeError if a path cannot have these characters.
    """
    try:
        os.fsencode(text)
        return text
    except UnicodeEncodeError:
        return os.fsdecode(text.encode("utf-8", sys.getfilesystemencodeerrors()))


def as_text(value: Any) -> Any:
    """Return the value of a setting in the form for a file."""
    return _each(value, decoded)


def equal(name: str, one: Any, other: Any) -> bool:
    """Return whether two values of a setting mean the same.

    name: name of the setting
    one, other: the values
    """
    return one == other or (name in PATHS and same(one, other))


def same(one: Any, other: Any) -> bool:
    """Return whether two values of a setting that is a path mean the same place.

    one, other: paths, or lists of them
    """
    return _each(one, os.path.realpath) == _each(other, os.path.realpath)


def _each(value: Any, change: Any) -> Any:
    """Apply a function to a path, or to each of several."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_each(one, change) for one in value)
    return value


def _exists(path: str) -> bool:
    """Return whether a file of this name exists, or one that matches this pattern."""
    return os.path.lexists(path) or any(glob.iglob(path))  # noqa: PTH207


def _root_only(run: Path, path: str) -> bool:
    """Return whether a path and the run have at most the root of the file system in common."""
    here, there = run.resolve(), Path(path).resolve()
    return here.anchor != there.anchor or here.parts[1:2] != there.parts[1:2]
