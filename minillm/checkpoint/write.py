"""Write checkpoints whole or not at all, without a risk to the last good one.

    checkpoints/step-00001000             complete; it gets this name when all of it is on the disk
    checkpoints/.step-00001000.tmp        being written, its manifest last
    checkpoints/.step-00001000.old.tmp    the former checkpoint of a step, while it is replaced
    checkpoints/.step-00001000.gone.tmp   being deleted

`tidy` removes the folders that a killed process left under a temporary name.
"""

import errno
import math
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from minillm.checkpoint.deletion import (
    delete,
    delete_all,
    delete_leftovers,
    holds_only_others,
    move_other_files,
    own_names,
)
from minillm.checkpoint.own_files import is_temporary, looks_ours
from minillm.checkpoint.placing import lock
from minillm.checkpoint.run_folder import RunFolder
from minillm.checkpoint.sharded_safetensors import (
    file_bytes,
    file_name,
    files_by_kind,
    key_of,
    range_of,
)
from minillm.distributed.agreement import agree, gather
from minillm.distributed.ranks import ALONE, Ranks
from minillm.errors import CorruptError, DivergedError, UsageError
from minillm.runtime.files import file_digest, read_json, sync_folder, write_json, write_whole
from minillm.runtime.ownership import remove_files

MARGIN = 1.1  # free space per byte of tensors: for headers, state.json and other programs
WRITTEN = re.compile(r"\.(step-\d{8})\.tmp")


def save(
    run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, ranks: Ranks = ALONE
) -> Path:
    """Write checkpoint `step` and return its folder. Every rank calls it.

    Afterwards the checkpoint is complete or does not exist.

    run: the folder, which must be the same one for all ranks
    step: number of steps that are done
    tensors: kind ("model", "optimizer", "ema") -> name -> tensor of this rank, with the same kinds
        on all ranks. A part of a tensor is 1-D and named by key_of(name, start, stop).
    state: content of state.json; that of rank 0 is written. If tensors are saved in parts, its
        "shapes" has the shape of every parameter by name.
    ranks: ranks that save together

    A rank that cannot write, or finds too little space on the disk, raises OSError, and the others
    raise UnavailableError. Raises DivergedError on all ranks, before anything is written, if a
    weight is not finite.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    temporary = final.with_name(f".{final.name}.tmp")
    first, state = ranks.rank == 0, {"step": step, **state}
    bytes_of_all = sum(gather(ranks, agree(ranks, lambda: _bytes_to_write(tensors))))
    try:
        agree(ranks, lambda: _make_empty(temporary, bytes_of_all) if first else None)
        parts = gather(ranks, agree(ranks, lambda: _write_own(temporary, tensors, state, ranks)))
        # The tensors of all ranks are on the disk. One rank does the rest.
        agree(ranks, lambda: _complete(temporary, final, parts, state) if first else None)
    except Exception:
        if first:
            _remove(temporary)
        raise
    return final


def _bytes_to_write(tensors: dict[str, dict[str, Tensor]]) -> int:
    """Return the bytes of this rank's tensors. Raise DivergedError if a weight is not finite."""
    for kind in tensors.keys() & {"model", "ema"}:
        require_finite(kind, tensors[kind])
    return sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())


def _make_empty(folder: Path, n_bytes: int) -> None:
    """Make an empty folder. Raise OSError if the disk has too little space for `n_bytes`."""
    if not folder.parent.is_dir():
        folder.parent.mkdir(parents=True)
        sync_folder(folder.parent.parent)
    free = shutil.disk_usage(folder.parent).free
    if free < MARGIN * n_bytes:
        what = f"{free / 2**20:,.1f} MiB are free and a checkpoint takes {n_bytes / 2**20:,.1f}"
        raise OSError(errno.ENOSPC, f"too little space on the disk: {what}", str(folder.parent))
    _remove(folder)
    folder.mkdir(exist_ok=holds_only_others(folder))


def _remove(folder: Path) -> None:
    """Delete what an earlier attempt wrote of a checkpoint under its temporary name."""
    if folder.is_dir():
        remove_files(folder, own_names(folder).__contains__)


def _write_own(folder: Path, tensors: dict, state: dict, ranks: Ranks) -> dict[str, dict]:
    """Write this rank's files, wait until they are on the disk, return their manifest entries.

    Raises ValueError if the length of a part is not the one in its name.
    """
    written = {}
    for kind, named in tensors.items():
        for key, t in named.items():
            if span := range_of(key):
                name, start, stop = span
                parameter = name.partition(".")[2] if kind == "optimizer" else name
                if t.shape != (stop - start,) or parameter not in state.get("shapes", {}):
                    raise ValueError(f"{kind} {key} is {list(t.shape)}, or of unknown shape")
        path = folder / file_name(kind, ranks.rank, ranks.size)
        written[path.name] = write_whole(path, file_bytes(named))
    return written


def _complete(temporary: Path, final: Path, parts: list[dict], state: dict) -> None:
    """Write state.json and then the manifest, and rename the folder to its final name."""
    files = {name: entry for part in parts for name, entry in part.items()}
    files_by_kind(temporary, files)
    files["state.json"] = write_json(temporary / "state.json", state)
    # Writing it syncs the folder, so that the names of all its files are on the disk.
    write_json(temporary / "manifest.json", {"files": dict(sorted(files.items()))})
    old = final.with_name(f".{final.name}.old.tmp")
    if final.exists():
        delete(old)
        final.rename(old)
    try:
        temporary.rename(final)
    except OSError:
        with suppress(OSError):  # if this fails too, RunFolder finds it under its temporary name
            old.rename(final)
        raise
    sync_folder(final.parent)
    if old.is_dir():
        move_other_files(old, final)
        delete(old)


def prune(run: str | PathLike[str], keep_last: int, best: int | None) -> None:
    """Delete all checkpoints but those to keep.

    run: folder of the run
    keep_last: number of the newest checkpoints that are kept
    best: a step that is kept too; None: none
    """
    steps = RunFolder(run).checkpoints()
    for step in sorted(steps)[:-keep_last]:
        if step != best:
            delete(steps[step])


def discard_after(run: str | PathLike[str], step: int) -> None:
    """Delete the checkpoints of later steps, after a roll-back to `step`.

    run: folder of the run
    step: step to which the run was rolled back
    """
    for later, folder in RunFolder(run).checkpoints().items():
        if later > step:
            delete(folder)


def set_aside(run: str | PathLike[str], step: int) -> list[Path]:
    """Rename the damaged checkpoints after `step`, from which the run is resumed.

    Otherwise one of them would be the last checkpoint again, and count among those that are kept.

    run: folder of the run
    step: step of the checkpoint that training resumes from

    Returns their new paths, such as checkpoints/damaged-step-00000200.
    """
    moved = []
    for later, folder in sorted(RunFolder(run).step_folders().items()):
        if later > step:
            target = folder.with_name(f"damaged-{folder.name}")
            delete(target)
            number = 1
            while target.exists():  # it holds files of others
                number += 1
                target = folder.with_name(f"damaged-{folder.name}-{number}")
            moved.append(folder.rename(target))
    if moved:
        sync_folder(moved[0].parent)
    return moved


def take_up(run: str | PathLike[str]) -> TextIO | None:
    """Lock a run to write into it, and remove what a killed process left. Return the lock file.

    Raises UsageError if a file that the run would write is not one of minillm.
    """
    path = RunFolder(run).require().path
    for name in ("metrics.jsonl", "metrics.jsonl.tmp", "samples.txt", "bad-steps.jsonl"):
        if os.path.lexists(path / name) and not looks_ours(path / name):
            raise UsageError(f"{path / name} is not one that minillm wrote; move it elsewhere")
    held = lock(path)
    tidy(path)
    return held


def tidy(run: Path) -> None:
    """Remove files that a killed process left under temporary names; the caller has locked the run.

    A checkpoint that was being replaced gets its name back. One that was written completely, but
    not renamed, gets its name if there is no other checkpoint.
    """
    for path in run.glob("*.tmp"):
        if is_temporary(path):
            path.unlink()
    delete_all(run / "checkpoints.tmp")  # an earlier release used this name before a deletion
    for step, folder in RunFolder(run).checkpoints().items():
        folder.rename(folder.with_name(f"step-{step:08d}"))
    for folder in sorted(run.glob("checkpoints/.step-*.tmp"), reverse=True):
        written = WRITTEN.fullmatch(folder.name)
        if written and not RunFolder(run).checkpoints() and _is_whole(folder):
            folder.rename(folder.with_name(written[1]))
    delete_leftovers(run / "checkpoints")
    if (run / "checkpoints").is_dir():
        sync_folder(run / "checkpoints")


def _is_whole(folder: Path) -> bool:
    """Return whether every file of a checkpoint has the digest in the manifest."""
    try:
        files: dict[str, Any] = read_json(folder / "manifest.json")["files"]
        return all(file_digest(folder / name) == files[name]["sha256"] for name in files)
    except (CorruptError, OSError):
        return False


def sharded_tensors(
    pieces: Iterable[Any], shapes: dict[str, tuple[int, ...]]
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors that `save` takes, from this rank's pieces of the parameters.

    pieces: pieces of the parameters on this rank, see distributed.pieces.Piece
    shapes: shapes of the whole parameters, by name
    """
    model, optimizer = {}, {}
    for p in pieces:
        whole = p.stop - p.start == math.prod(shapes[p.name])
        key, shape = (p.name, shapes[p.name]) if whole else (key_of(p.name, p.start, p.stop), (-1,))
        model[key] = p.master.view(shape)
        for kind, value in p.state.items():
            if value.dim():
                optimizer[f"{kind}.{key}"] = value.view(shape)
            else:
                optimizer[f"{kind}.{p.name}"] = value
    return {"model": model, "optimizer": optimizer}


def require_finite(kind: str, named: dict[str, Tensor]) -> None:
    """Raise DivergedError, naming the tensor, unless every value is finite.

    kind: kind of the tensors, for the message
    named: tensors by name
    """
    for name, t in named.items():
        # A finite sum means that all values are finite, and takes a ninth of the time. If it is not
        # finite, each value is looked at, because the sum itself may have overflowed.
        if not torch.isfinite(t.detach().sum()) and not torch.isfinite(t.detach()).all():
            raise DivergedError(f"{name} of the {kind} is not finite; no checkpoint is written")
