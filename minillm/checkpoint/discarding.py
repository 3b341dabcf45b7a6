"""Delete checkpoints, and what a killed process left of them, without the files of others.

A checkpoint's own files are those that its manifest names. Where the manifest cannot be read, or is
not written yet, they are the files whose names saving.py makes. Everything else stays where it is.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from minillm.checkpoint.sharded_safetensors import FILE
from minillm.errors import CorruptError
from minillm.runtime.files import read_json
from minillm.runtime.ownership import names_in, remove_files

STEP = re.compile(r"step-(\d{8})")
ASIDE = re.compile(r"\.step-(\d{8})\.old\.tmp")
# Being written, put aside, being deleted; see saving.py.
LEFT = re.compile(r"\.step-\d{8}(\.old)?\.tmp|\.step-\d{8}(\.old\.tmp)?\.gone\.tmp")
UNNAMED = re.compile(r"\.step-\d{8}\.tmp|.*\.gone\.tmp")  # those that may lack a manifest
DAMAGED = re.compile(r"damaged-step-\d{8}(-\d+)?")
WRITTEN = re.compile(r"(state|manifest)\.json(\.tmp)?")


def own_names(folder: Path) -> frozenset[str]:
    """Return the names of the files in a checkpoint's folder that belong to it."""
    present = names_in(folder)
    written = {name for name in present if WRITTEN.fullmatch(name)}
    parts = {name for name in present if FILE.fullmatch(name)}
    for name in ("manifest.json", "manifest.json.tmp"):  # the latter while it is being deleted
        with suppress(CorruptError, OSError, KeyError, TypeError, AttributeError):
            return frozenset(written | (parts & read_json(folder / name)["files"].keys()))
    if written or UNNAMED.fullmatch(folder.name):
        return frozenset(written | parts)
    return frozenset()


def is_of_others(folder: Path) -> bool:
    """Return whether a folder holds something, but nothing of a checkpoint."""
    try:
        return bool(names_in(folder)) and not own_names(folder)
    except OSError:
        return False


def discard(folder: Path) -> None:
    """Delete a checkpoint, if it is there, by way of a name that no reader takes for one.

    Where others have put files into it, the folder keeps its name, and its manifest gets another.
    What cannot be deleted now is left to `clear`.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    own, present = own_names(folder), names_in(folder)
    if own == set(present):
        gone = folder.with_name(f".{folder.name.strip('.')}.gone.tmp")
        remove_files(gone, lambda name: WRITTEN.fullmatch(name) or FILE.fullmatch(name))
        if not gone.exists():
            folder = folder.rename(gone)
    manifest = folder / "manifest.json.tmp"
    with suppress(OSError):  # no reader takes it for a checkpoint, and `own_names` still reads it
        (folder / "manifest.json").rename(manifest)
    remove_files(folder, (own - {manifest.name}).__contains__)
    remove_files(folder, {manifest.name}.__contains__)


def carry_over(old: Path, new: Path) -> None:
    """Move what others have put into checkpoint `old` to `new`, which replaces it.

    Files that are named as those of a checkpoint stay: they would make `new` look damaged.
    """
    for name in set(names_in(old)) - own_names(old):
        if not FILE.fullmatch(name) and not os.path.lexists(new / name):
            (old / name).rename(new / name)


def clear(checkpoints: Path) -> None:
    """Delete what killed processes left in a folder of checkpoints."""
    for folder in _folders(checkpoints, LEFT):
        remove_files(folder, own_names(folder).__contains__)
    for folder in _folders(checkpoints, STEP):
        if not (folder / "manifest.json").exists() and (folder / "manifest.json.tmp").exists():
            discard(folder)


def discard_all(checkpoints: Path) -> None:
    """Delete all checkpoints in a folder, the newest last, and the folder if it is then empty."""
    if checkpoints.is_symlink() or not checkpoints.is_dir():
        return
    clear(checkpoints)
    for pattern in (DAMAGED, STEP):
        for folder in _folders(checkpoints, pattern):
            discard(folder)
    with suppress(OSError):
        checkpoints.rmdir()


def _folders(checkpoints: Path, pattern: re.Pattern) -> list[Path]:
    found = sorted(p for p in checkpoints.glob("*") if pattern.fullmatch(p.name))
    return [path for path in found if path.is_dir() and not path.is_symlink()]
