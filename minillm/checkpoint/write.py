"""Checkpoints written: whole or not at all, and never at the cost of the last good one.

    checkpoints/step-00001000             whole; it gets this name when all of it is on the disk
    checkpoints/.step-00001000.tmp        being written, its manifest last
    checkpoints/.step-00001000.old.tmp    what that step held, until the new one has the name
    checkpoints/.step-00001000.gone.tmp   being deleted

What a killed process leaves under a temporary name, `tidy` takes away. What this room does not do:
read checkpoints (checkpoint.py).
"""

import errno
import math
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from minillm.checkpoint.discarding import (
    carry_over,
    clear,
    discard,
    discard_all,
    is_of_others,
    own_names,
)
from minillm.checkpoint.placing import is_temporary, lock
from minillm.checkpoint.run_folder import RunFolder
from minillm.checkpoint.sharded_safetensors import (
    file_bytes,
    file_name,
    files_by_kind,
    key_of,
    range_of,
)
from minillm.distributed.agreement import agree, gather
from minillm.distributed.ranks import Ranks
from minillm.errors import CorruptError, DivergedError
from minillm.runtime.files import file_digest, read_json, sync_folder, write_json, write_whole
from minillm.runtime.ownership import remove_files

ALONE = Ranks()
MARGIN = 1.1  # of free space: the header, state.json and whatever else is written meanwhile
WRITTEN = re.compile(r"\.(step-\d{8})\.tmp")


def save(
    run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, ranks: Ranks = ALONE
) -> Path:
    """Write checkpoint `step`; afterwards it is whole or absent. Every rank calls it.

    tensors: kind ("model", "optimizer", "ema") -> name -> tensor, this rank's own, the same kinds
    on each. A part of one, in one dimension, is called tensorfiles.key_of(name, start, stop).
    state: JSON, rank 0's; with parts its "shapes" says the shape of every parameter, by name.
    The folder must be the same for all ranks. If one cannot write, or there is no room on the disk,
    it raises its own OSError, the others UnavailableError. Raises DivergedError, on all alike and
    before anything is written, if a weight is not finite.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    temporary = final.with_name(f".{final.name}.tmp")
    first, state = ranks.rank == 0, {"step": step, **state}
    bytes_of_all = sum(gather(ranks, agree(ranks, lambda: _bytes_to_write(tensors))))
    try:
        agree(ranks, lambda: _make_anew(temporary, bytes_of_all) if first else None)
        parts = gather(ranks, agree(ranks, lambda: _write_own(temporary, tensors, state, ranks)))
        # What the ranks have is on the disk; the rest is one rank's work.
        agree(ranks, lambda: _complete(temporary, final, parts, state) if first else None)
    except Exception:
        if first:
            _remove(temporary)
        raise
    return final


def _bytes_to_write(tensors: dict[str, dict[str, Tensor]]) -> int:
    """Of this rank's tensors. Raises DivergedError if a weight is not finite."""
    for kind in tensors.keys() & {"model", "ema"}:
        require_finite(kind, tensors[kind])
    return sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())


def _make_anew(folder: Path, n_bytes: int) -> None:
    """Make an empty folder. Raises OSError if the disk has no room for `n_bytes` and some more."""
    if not folder.parent.is_dir():
        folder.parent.mkdir(parents=True)
        sync_folder(folder.parent.parent)
    free = shutil.disk_usage(folder.parent).free
    if free < MARGIN * n_bytes:
        what = f"{free / 2**20:,.1f} MiB are free and a checkpoint takes {n_bytes / 2**20:,.1f}"
        raise OSError(errno.ENOSPC, f"no room on the disk: {what}", str(folder.parent))
    _remove(folder)
    folder.mkdir(exist_ok=is_of_others(folder))


def _remove(folder: Path) -> None:
    """Delete what an earlier attempt has written of a checkpoint, under its temporary name."""
    if folder.is_dir():
        remove_files(folder, own_names(folder).__contains__)


def _write_own(folder: Path, tensors: dict, state: dict, ranks: Ranks) -> dict[str, dict]:
    """Write this rank's files and wait until they are on the disk; their entries in the manifest.

    ValueError if a part is not what its name says.
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
    """Write what is left, the manifest last, and give the folder its name."""
    files = {name: entry for part in parts for name, entry in part.items()}
    files_by_kind(temporary, files)
    files["state.json"] = write_json(temporary / "state.json", state)
    # With it, the names of all files in the folder are on the disk.
    write_json(temporary / "manifest.json", {"files": dict(sorted(files.items()))})
    aside = final.with_name(f".{final.name}.old.tmp")
    if final.exists():
        discard(aside)
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        with suppress(
            OSError
        ):  # if not even that can be done, RunFolder.checkpoints finds it there
            aside.rename(final)
        raise
    sync_folder(final.parent)
    if aside.is_dir():
        carry_over(aside, final)
        discard(aside)


def prune(run: str | PathLike[str], keep_last: int, best: int | None) -> None:
    """Delete all checkpoints but the newest `keep_last` and step `best`."""
    steps = RunFolder(run).checkpoints()
    for step in sorted(steps)[:-keep_last]:
        if step != best:
            discard(steps[step])


def discard_after(run: str | PathLike[str], step: int) -> None:
    """Delete the checkpoints of later steps, which a roll-back has made untrue."""
    for later, folder in RunFolder(run).checkpoints().items():
        if later > step:
            discard(folder)


def set_aside(run: str | PathLike[str], step: int) -> list[Path]:
    """Rename all checkpoints after `step`, which a run that goes on from there has passed over as
    damaged: none of them shall be the last one again, or keep a good one from being kept.

    Returns where they are now: checkpoints/damaged-step-00000200.
    """
    moved = []
    for later, folder in sorted(RunFolder(run).step_folders().items()):
        if later > step:
            place = folder.with_name(f"damaged-{folder.name}")
            discard(place)
            number = 1
            while place.exists():  # others have put files into it
                number += 1
                place = folder.with_name(f"damaged-{folder.name}-{number}")
            moved.append(folder.rename(place))
    if moved:
        sync_folder(moved[0].parent)
    return moved


def take_up(run: str | PathLike[str]) -> TextIO | None:
    """Lock a run that is to be written, and take away what a killed process left in it."""
    path = RunFolder(run).require().path
    held = lock(path)
    tidy(path)
    return held


def tidy(run: Path) -> None:
    """Take away what a killed process left under temporary names; for who holds the run's lock.

    A checkpoint that was put aside to be replaced gets its name back, and one that lacked nothing
    but its name gets it if there is no other.
    """
    for path in run.glob("*.tmp"):
        if is_temporary(path):
            path.unlink()
    discard_all(run / "checkpoints.tmp")  # what an earlier release deleted by way of this name
    for step, folder in RunFolder(run).checkpoints().items():
        folder.rename(folder.with_name(f"step-{step:08d}"))
    for folder in sorted(run.glob("checkpoints/.step-*.tmp"), reverse=True):
        written = WRITTEN.fullmatch(folder.name)
        if written and not RunFolder(run).checkpoints() and _is_whole(folder):
            folder.rename(folder.with_name(written[1]))
    clear(run / "checkpoints")
    if (run / "checkpoints").is_dir():
        sync_folder(run / "checkpoints")


def _is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is what the manifest says."""
    try:
        files: dict[str, Any] = read_json(folder / "manifest.json")["files"]
        return all(file_digest(folder / name) == files[name]["sha256"] for name in files)
    except (CorruptError, OSError):
        return False


def sharded_tensors(
    pieces: Iterable[Any], shapes: dict[str, tuple[int, ...]]
) -> dict[str, dict[str, Tensor]]:
    """What checkpoint.save wants of a rank that keeps pieces of parameters: "model", "optimizer".

    pieces: of elements [p.start, p.stop) of parameter p.name, row by row: p.master, their values,
    and p.state, kind -> their state: (stop - start,), or () for one number for all of them.
    shapes: of the whole parameters.
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
    """Raise DivergedError, naming the tensor, unless every value is finite."""
    for name, t in named.items():
        # The sum is finite only if all of them are, and nine times cheaper than looking at each;
        # a sum may also be too large where none of them is.
        if not torch.isfinite(t.detach().sum()) and not torch.isfinite(t.detach()).all():
            raise DivergedError(f"{name} of the {kind} is not finite; no checkpoint is written")
