"""Decide which folders and files minillm made, so that it deletes and overwrites no others.

A folder is ours only if its manifest says so: config.json of a run, index.json of a prepared
corpus, results.json of a profile. Other programs use these names too, so the content counts. Before
a deletion the manifest must be intact and ours. For reading it is enough that the folder looks like
ours: a damaged run does, and is then reported as damaged.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.errors import CorruptError
from minillm.runtime.files import MAX_JSON, read_json


@dataclass(frozen=True)
class Kind:
    """A kind of folder that minillm makes.

    name: its name in messages
    manifest: file that says what the folder is
    keys: keys that every such manifest has
    others: glob of other files in such a folder, by which it is recognised if the manifest is
        damaged
    """

    name: str
    manifest: str
    keys: frozenset[str]
    others: str | None


RUN = Kind(
    "run", "config.json",
    frozenset(("model", "train", "tokenizer_sha256", "version", "sha256")),
    "checkpoints/*step-????????*",
)  # fmt: skip
CORPUS = Kind(
    "prepared corpus", "index.json",
    frozenset(("shards", "vocab_size", "tokenizer_sha256", "version", "sha256")), "train-?????.bin",
)  # fmt: skip
PROFILE = Kind("profile", "results.json", frozenset(("about", "suites")), None)


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run of minillm: its config.json is intact, and ours."""
    try:
        return read_json(folder / RUN.manifest).keys() >= RUN.keys - {"sha256"}
    except (CorruptError, OSError):
        return False


def claims(folder: Path, kind: Kind) -> bool:
    """Return whether a folder looks like one of a kind, intact or damaged.

    folder: the folder
    kind: the kind
    """
    path = folder / kind.manifest
    if not os.path.lexists(path):
        return False
    content: Any = None
    with suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= MAX_JSON:
            content = json.loads(path.read_bytes())
    # A flipped bit may have changed the name of a key, but not of a profile, which has only two.
    enough = max(2, len(kind.keys) - 1)
    if isinstance(content, dict) and len(kind.keys & content.keys()) >= enough:
        return True
    return kind.others is not None and any(folder.glob(kind.others))


def product(folder: Path) -> str | None:
    """Return the name of a folder's kind if minillm made it, else None."""
    return next((kind.name for kind in (RUN, CORPUS, PROFILE) if claims(folder, kind)), None)


def product_around(path: Path) -> str | None:
    """Return the kind of the nearest folder of minillm that a path is in, or None."""
    return next((found for folder in path.absolute().parents if (found := product(folder))), None)


def remove_files(folder: Path, ours: Callable[[str], bool]) -> None:
    """Delete our files in a folder, and then the folder if it is empty.

    Folders in it, links, and files with other names are kept. A link to a folder is not followed.
    Files that cannot be deleted are kept too.

    folder: the folder
    ours: predicate for the names of the files to delete
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for name in sorted(names_in(folder)):
        path = folder / name
        if ours(name) and is_plain_file(path):
            with suppress(OSError):
                path.unlink()
    with suppress(OSError):
        folder.rmdir()


def is_plain_file(path: Path) -> bool:
    """Return whether a path is a regular file itself, not a link to one."""
    return path.is_file() and not path.is_symlink()


def names_in(folder: Path) -> list[str]:
    """Return the names of everything in a folder."""
    return [path.name for path in folder.iterdir()]
