"""Checkpoints: written whole or not at all, hashed, never a pickle.

    runs/NAME/checkpoints/step-00001000/{model,optimizer,ema}-00001-of-00001.safetensors,
                                        state.json, manifest.json

A checkpoint is written under a temporary name and renamed when everything is on the disk; its
manifest holds the SHA-256 of every file and one of itself. Each of N ranks writes a file
KIND-0000R-of-0000N of what it has, and any number of ranks reads it, each what it needs.
"""

import errno
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minillm.agreement import agree, gather
from minillm.config import ModelConfig
from minillm.errors import CorruptError, UsageError, one_line
from minillm.model import GPT
from minillm.ops import select
from minillm.ranks import Ranks
from minillm.reading import Checkpoint, read_state, shape_of, verified
from minillm.runs import (
    checkpoints_of,
    folder_of,
    load_run_tokenizer,
    read_config,
    require_run,
    step_folders,
)
from minillm.storage import file_digest, sync_file, sync_folder, write_json
from minillm.tensorfiles import file_name, files_by_kind, range_of
from minillm.tokenizer import Tokenizer

ALONE = Ranks()
SMALL = 10_000_000  # parameters that are no danger to anybody's memory


def save(
    run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, ranks: Ranks = ALONE
) -> Path:
    """Write checkpoint `step`; afterwards it is whole or absent. Every rank calls it.

    tensors: kind ("model", "optimizer", "ema") -> name -> tensor, this rank's own, the same kinds
    on each. A part of one, in one dimension, is called tensorfiles.key_of(name, start, stop).
    state: JSON, rank 0's; with parts its "shapes" says the shape of every parameter, by name.
    The folder must be the same for all ranks. If one cannot write, it raises its own OSError, the
    others UnavailableError.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    temporary = final.with_name(f".{final.name}.tmp")
    first, state = ranks.rank == 0, {"step": step, **state}
    try:
        agree(ranks, lambda: _make_anew(temporary) if first else None)
        parts = gather(ranks, agree(ranks, lambda: _write_own(temporary, tensors, state, ranks)))
        # What the ranks have is on the disk; the rest is one rank's work.
        agree(ranks, lambda: _complete(temporary, final, parts, state) if first else None)
    except Exception:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_own(folder: Path, tensors: dict, state: dict, ranks: Ranks) -> dict[str, dict]:
    """Write this rank's files and wait until they are on the disk; their entries in the manifest.

    ValueError if a part is not what its name says.
    """
    written = {}
    for kind, named in tensors.items():
        for key, t in named.items():
            if span := range_of(key):
                name, start, stop = span
                if t.shape != (stop - start,) or shape_of(state, kind, name) is None:
                    raise ValueError(f"{kind} {key} is {list(t.shape)}, or of unknown shape")
        named = {name: t.detach().cpu().contiguous() for name, t in named.items()}
        path = folder / file_name(kind, ranks.rank, ranks.size)
        try:
            save_file(named, path, {"format": "pt"})
        except SafetensorError as error:  # which hides the system's own
            raise OSError(errno.EIO, str(error), str(path)) from None
        written[path.name] = _durable(path)
    return written


def _durable(path: Path) -> dict[str, Any]:
    """Wait until a file is on the disk; its entry in the manifest."""
    sync_file(path)
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _complete(temporary: Path, final: Path, parts: list[dict], state: dict) -> None:
    """Write what is left, the manifest last, and give the folder its name."""
    write_json(temporary / "state.json", state)
    files = {name: entry for part in parts for name, entry in part.items()}
    files_by_kind(temporary, files)
    files["state.json"] = _durable(temporary / "state.json")
    write_json(temporary / "manifest.json", {"files": dict(sorted(files.items()))})
    if final.exists():
        shutil.rmtree(final)
    temporary.replace(final)
    sync_folder(final.parent)


def prune(run: Path, keep_last: int, best: int | None) -> None:
    """Delete all checkpoints but the newest `keep_last` and step `best`."""
    steps = checkpoints_of(run)
    for step in sorted(steps)[:-keep_last]:
        if step != best:
            shutil.rmtree(steps[step])


def discard_after(run: Path, step: int) -> None:
    """Delete the checkpoints of later steps, which a roll-back has made untrue."""
    for later, folder in checkpoints_of(run).items():
        if later > step:
            shutil.rmtree(folder)


def open_checkpoint(
    run: Path, which: str = "last", ranks: Ranks = ALONE, say: Callable[[str], None] | None = None
) -> Checkpoint:
    """The checkpoint "last", "best" or of a step number, every file checked against its hash.

    Where the last one is damaged, the newest good one before it is opened, and `say` (default: a
    line on standard error) is given a warning for each that was passed over. One that was asked for
    by its step, or as the best, is no other's place: the good steps are named.
    Every rank calls it, hashes its share of the files and learns what the others found.
    Raises UsageError if there is no such run or checkpoint, CorruptError if it is damaged or none
    is good; the same on all ranks.
    """
    steps = gather(ranks, agree(ranks, lambda: _all_steps(run)))[0]
    if which != "last":
        return _asked_for(run, which, steps, ranks)
    found, damages = _newest_good(run, steps, ranks)
    if found is None:
        raise CorruptError(f"{damages[0]}; no other checkpoint of the run is good")
    for damage in damages:
        (say or ranks.say)(one_line(f"warning: {damage}; going on from step {found.step}"))
    return found


def _all_steps(run: Path) -> list[int]:
    """The steps of all checkpoints, damaged ones among them, the newest first."""
    steps = sorted(step_folders(require_run(run)), reverse=True)
    if not steps:
        raise UsageError(
            f"{run} holds no checkpoint; train it anew: python train.py --out {run} --overwrite"
        )
    return steps


def _newest_good(
    run: Path, steps: list[int], ranks: Ranks
) -> tuple[Checkpoint | None, list[CorruptError]]:
    """The first of these checkpoints that is whole, if any, and what those before it are."""
    damages = []
    for step in steps:
        try:
            return verified(folder_of(run, step), step, ranks), damages
        except CorruptError as damage:
            damages.append(damage)
    return None, damages


def _asked_for(run: Path, which: str, steps: list[int], ranks: Ranks) -> Checkpoint:
    """The checkpoint "best" or of a step number, and no other."""
    try:
        step = gather(ranks, agree(ranks, lambda: _step_of(run, which, steps)))[0]
        return verified(folder_of(run, step), step, ranks)
    except CorruptError as damage:
        good = [s for s in reversed(steps) if _newest_good(run, [s], ranks)[0]]
        known = f"good: {', '.join(map(str, good))}" if good else "no other is good"
        raise CorruptError(f"{damage}; --checkpoint {which} is refused; {known}") from None


def _step_of(run: Path, which: str, steps: list[int]) -> int:
    step = int(which) if which.isdecimal() and len(which) <= 8 else -1
    if which == "best":
        best = read_state(folder_of(run, steps[0])).get("progress", {}).get("best_step")
        step = steps[0] if best is None else best
    if step not in steps:
        known = ", ".join(map(str, sorted(steps)))
        raise UsageError(f"--checkpoint {which}: {run} holds steps {known}; or last, best")
    return step


def set_aside(run: Path, step: int) -> list[Path]:
    """Rename all checkpoints after `step`, which a run that goes on from there has passed over as
    damaged: none of them shall be the last one again, or keep a good one from being kept.

    Returns where they are now: checkpoints/damaged-step-00000200.
    """
    moved = []
    for later, folder in sorted(step_folders(run).items()):
        if later > step:
            place = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(place, ignore_errors=True)
            moved.append(folder.rename(place))
    if moved:
        sync_folder(moved[0].parent)
    return moved


def load_run(
    run: str | Path,
    *,
    checkpoint: str | Checkpoint = "last",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernels: str = "auto",
) -> tuple[GPT, Tokenizer, ModelConfig]:
    """The model of a run, ready to generate, its tokenizer and its configuration.

    checkpoint: "last", "best", a step, or one that open_checkpoint has opened.
    dtype: of the weights and the computation. The averaged weights are taken where there are any.
    Raises UsageError if there is no such run, CorruptError if a file is damaged.
    """
    run = Path(run)
    config, _ = read_config(run)
    found = open_checkpoint(run, checkpoint) if isinstance(checkpoint, str) else checkpoint
    check_model(run, config, found)
    ops = select(
        kernels, device,
        d_model=config.d_model, d_head=config.d_head, vocab_size=config.vocab_size,
    )  # fmt: skip
    model = GPT(config, ops, dtype)
    found.load_into(model)
    tokenizer = load_run_tokenizer(run, config)
    model = model.to(device).eval().requires_grad_(False)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    if model.head.weight.device.type == "cpu":
        _store_by_columns(model)
    return model, tokenizer, config


def check_model(run: Path, config: ModelConfig, found: Checkpoint) -> None:
    """Raise CorruptError, before any memory is taken, unless the run's configuration is that of the
    checkpoint: another run's may have the same names and shapes, and be another model.
    """
    own, held = asdict(config), found.n_elements("model")
    for name, value in found.state.get("model", {}).items():
        if value != own.get(name):
            raise CorruptError(
                f"{run}/config.json: states {name} {own.get(name)!r}, step {found.step} was "
                f"trained with {value!r}; is it another run's?"
            )
    if config.n_parameters > 2 * held + SMALL:
        raise CorruptError(
            f"{run}/config.json: states {config.n_parameters:,} parameters, {found.folder} holds "
            f"{held:,}"
        )


def _store_by_columns(model: GPT) -> None:
    """Keep each matrix's columns, not its rows, together in memory; the values stay.

    A CPU multiplies one row by such a matrix 1.5 to 2.5 times faster, and more rows no slower:
    that is decoding (benchmarks/README.md).
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


def tidy(run: Path) -> None:
    """To be replaced."""
