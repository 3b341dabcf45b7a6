"""Decide which folders and files minillm made itself, so that it deletes and overwrites no others.

A folder is ours only if its own manifest says so: config.json of a run, index.json of a prepared
corpus, results.json of a profile. Other programs use these names too, so it is the content that
counts. There are two questions. Before anything is deleted: is the manifest whole, and ours? To
read: does the folder claim to be ours? A damaged run does, and is then reported as damaged.
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

    name: what a message calls it
    manifest: the file that says what the folder is
    keys: some that every such manifest has
    others: a glob of what else such a folder holds; it tells whose a damaged manifest is
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
    """Return whether a folder is a run of minillm: its config.json is whole, and ours."""
    try:
        return read_json(folder / RUN.manifest).keys() >= RUN.keys - {"sha256"}
    except (CorruptError, OSError):
        return False


def claims(folder: Path, kind: Kind) -> bool:
    """Return whether a folder claims to be of a kind, whole or damaged."""
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
    """Return what a folder is, in words, if minillm made it; else None.

    It is what no folder of texts is read for.
    """
    return next((kind.name for kind in (RUN, CORPUS, PROFILE) if claims(folder, kind)), None)


def product_around(path: Path) -> str | None:
    """Return what the nearest folder of ours that `path` lies in is, in words; None: in none."""
    return next((found for folder in path.absolute().parents if (found := product(folder))), None)


def remove_files(folder: Path, ours: Callable[[str], bool]) -> None:
    """Delete the files of a folder whose names are `ours`, and then the folder if it is empty.

    Folders in it, links, and files of other names stay, and a link to a folder is not followed.
    What cannot be deleted stays too.
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
    """Return the names of all that is in a folder."""
    return [path.name for path in folder.iterdir()]
