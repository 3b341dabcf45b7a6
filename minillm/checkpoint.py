"""Checkpoints: written whole or not at all (saving.py), hashed, never a pickle.

    runs/NAME/checkpoints/step-00001000/{model,optimizer,ema}-00001-of-00001.safetensors,
                                        state.json, manifest.json

A checkpoint is written under a temporary name and renamed when everything is on the disk; its
manifest holds the SHA-256 of every file and one of itself. Each of N ranks writes a file
KIND-0000R-of-0000N of what it has, and any number of ranks reads it, each what it needs.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from minillm.agreement import agree, gather
from minillm.config import ModelConfig
from minillm.errors import CorruptError, UsageError, one_line
from minillm.launch import shell_command
from minillm.model import GPT
from minillm.ops import select
from minillm.ranks import Ranks
from minillm.reading import Checkpoint, read_state, verified
from minillm.runs import (
    folder_of,
    load_run_tokenizer,
    read_config,
    require_run,
    step_folders,
)
from minillm.saving import ALONE, discard_after, prune, save, set_aside, take_up, tidy
from minillm.tokenizer import Tokenizer

__all__ = [
    "Checkpoint", "check_model", "discard_after", "load_run", "open_checkpoint", "prune", "save",
    "set_aside", "take_up", "tidy", "verified",
]  # fmt: skip
SMALL = 10_000_000  # parameters that are no danger to anybody's memory


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
            f"{run} holds no checkpoint yet; train on: {shell_command('train', '--resume', run)}"
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
