"""Delete checkpoints, and the parts of them that a killed process left, but no other files.

The files of a checkpoint are those that its manifest names. Where the manifest cannot be read or is
not written yet, they are the files whose names write.py gives. All other files stay.
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
REPLACED = re.compile(r"\.step-(\d{8})\.old\.tmp")
# The temporary names in write.py: being written, being replaced, being deleted.
TEMPORARY = re.compile(r"\.step-\d{8}(\.old)?\.tmp|\.step-\d{8}(\.old\.tmp)?\.gone\.tmp")
UNFINISHED = re.compile(r"\.step-\d{8}\.tmp|.*\.gone\.tmp")  # those that may lack a manifest
DAMAGED = re.compile(r"damaged-step-\d{8}(-\d+)?")
WRITTEN = re.compile(r"(state|manifest)\.json(\.tmp)?")


def own_names(folder: Path) -> frozenset[str]:
    """Return the names of the files in a checkpoint's folder that belong to the checkpoint."""
    present = names_in(folder)
    written = {name for name in present if WRITTEN.fullmatch(name)}
    parts = {name for name in present if FILE.fullmatch(name)}
    for name in ("manifest.json", "manifest.json.tmp"):  # the latter while it is being deleted
        with suppress(CorruptError, OSError, KeyError, TypeError, AttributeError):
            return frozenset(written | (parts & read_json(folder / name)["files"].keys()))
    if written or UNFINISHED.fullmatch(folder.name):
        return frozenset(written | parts)
    return frozenset()


def holds_only_others(folder: Path) -> bool:
    """Return whether a folder holds files, but none of a checkpoint."""
    try:
        return bool(names_in(folder)) and not own_names(folder)
    except OSError:
        return False


def delete(folder: Path) -> None:
    """Delete a checkpoint, if it exists. No reader sees it half deleted.

    The folder is renamed first. If it also holds other files, it keeps its name, and the manifest
    in it is renamed instead. Files that cannot be deleted now are left for `delete_leftovers`.
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
    with suppress(OSError):  # no reader takes it for a checkpoint then; `own_names` still reads it
        (folder / "manifest.json").rename(manifest)
    remove_files(folder, (own - {manifest.name}).__contains__)
    remove_files(folder, {manifest.name}.__contains__)


def move_other_files(old: Path, new: Path) -> None:
    """Move files that do not belong to checkpoint `old` into the checkpoint that replaces it.

    Files that are named like those of a checkpoint stay, because `new` would look damaged.

    old: folder of the checkpoint that is replaced
    new: folder of the complete checkpoint that replaces it
    """
    for name in set(names_in(old)) - own_names(old):
        if not FILE.fullmatch(name) and not os.path.lexists(new / name):
            (old / name).rename(new / name)


def delete_leftovers(checkpoints: Path) -> None:
    """Delete the temporary folders that killed processes left in a folder of checkpoints."""
    for folder in _folders(checkpoints, TEMPORARY):
        remove_files(folder, own_names(folder).__contains__)
    for folder in _folders(checkpoints, STEP):
        if not (folder / "manifest.json").exists() and (folder / "manifest.json.tmp").exists():
            delete(folder)


def delete_all(checkpoints: Path) -> None:
    """Delete all checkpoints in a folder, the newest last, and the folder if it is empty then."""
    if checkpoints.is_symlink() or not checkpoints.is_dir():
        return
    delete_leftovers(checkpoints)
    for pattern in (DAMAGED, STEP):
        for folder in _folders(checkpoints, pattern):
            delete(folder)
    with suppress(OSError):
        checkpoints.rmdir()


def _folders(checkpoints: Path, pattern: re.Pattern) -> list[Path]:
    found = sorted(p for p in checkpoints.glob("*") if pattern.fullmatch(p.name))
    return [path for path in found if path.is_dir() and not path.is_symlink()]
