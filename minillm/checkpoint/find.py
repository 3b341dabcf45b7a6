"""Checkpoints: written whole or not at all (saving.py), hashed, never a pickle.

    runs/NAME/checkpoints/step-00001000/{model,optimizer,ema}-00001-of-00001.safetensors,
                                        state.json, manifest.json

A checkpoint is written under a temporary name and renamed when everything is on the disk; its
manifest holds the SHA-256 of every file and one of itself. Each of N ranks writes a file
KIND-0000R-of-0000N of what it has, and any number of ranks reads it, each what it needs.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from typing import TypeVar

import torch

from minillm.checkpoint.read import Checkpoint, read_state, verified
from minillm.checkpoint.run_folder import TRIES, RunFolder
from minillm.checkpoint.write import ALONE, discard_after, prune, save, set_aside, take_up, tidy
from minillm.config.train import ModelConfig
from minillm.data.tokenizer import Tokenizer
from minillm.distributed.agreement import agree, gather
from minillm.distributed.ranks import Ranks
from minillm.errors import CorruptError, UsageError
from minillm.model.gpt import GPT
from minillm.ops import select
from minillm.runtime.launch import shell_command
from minillm.runtime.program import one_line

__all__ = [
    "Checkpoint", "check_model", "discard_after", "load_run", "open_checkpoint", "prune", "save",
    "set_aside", "take_up", "tidy", "verified", "while_there",
]  # fmt: skip
T = TypeVar("T")
SMALL = 10_000_000  # parameters that are no danger to anybody's memory


def open_checkpoint(
    run: str | PathLike[str],
    which: str = "last",
    ranks: Ranks = ALONE,
    say: Callable[[str], None] | None = None,
    weights: bool = False,
) -> Checkpoint:
    """Open the checkpoint "last", "best" or of a step number, its files checked against hashes.

    Where the last one is damaged, the newest good one before it is opened, and `say` (default: a
    line on standard error) is given a warning for each that was passed over. One that was asked for
    by its step, or as the best, is no other's place: the good steps are named. If a training
    deletes checkpoints meanwhile, the run is looked at again.

    Every rank calls it, hashes its share of the files and learns what the others found.

    weights: check and open only the weights to generate with; the optimiser's files may be missing

    Raises UsageError if there is no such run or checkpoint, CorruptError if it is damaged or none
    is good; the same on all ranks.
    """
    run = RunFolder(run)
    for _ in range(TRIES):
        there = gather(ranks, agree(ranks, lambda: _all_steps(run)))[0]
        steps = [step for step, _ in there]
        look = _Look(run, steps, ranks, weights)
        found, damages = look.newest_good(steps) if which == "last" else look.asked_for(which)
        if not damages or gather(ranks, agree(ranks, lambda: _all_steps(run)))[0] == there:
            break
    if found is None:
        raise CorruptError(f"{damages[0]}; {look.advice(which)}")
    for damage in damages:
        (say or ranks.say)(one_line(f"warning: {damage}; going on from step {found.step}"))
    return found


def _all_steps(run: RunFolder) -> list[list]:
    """List all checkpoints, damaged ones among them, the newest first; see RunFolder.listing."""
    there = sorted(map(list, run.require().listing()), key=lambda one: -one[0])
    if not there:
        raise UsageError(
            f"{run} holds no checkpoint yet; train on: {shell_command('train', '--resume', run)}"
        )
    return there


@dataclass(frozen=True)
class _Look:
    """One look at the checkpoints of a run.

    steps: those that there are, the newest first
    weights: as open_checkpoint takes it
    """

    run: RunFolder
    steps: list[int]
    ranks: Ranks
    weights: bool

    def newest_good(self, steps: list[int]) -> tuple[Checkpoint | None, list[CorruptError]]:
        """Return the first of these checkpoints that is whole, if any, and what is wrong before."""
        damages = []
        for step in steps:
            try:
                return verified(self.run.step_folder(step), step, self.ranks, self.weights), damages
            except CorruptError as damage:
                damages.append(damage)
        return None, damages

    def asked_for(self, which: str) -> tuple[Checkpoint | None, list[CorruptError]]:
        """Return the checkpoint "best" or of a step number, and no other."""
        try:
            step = agree(self.ranks, lambda: _step_of(self.run, which, self.steps))
        except CorruptError as damage:
            return None, [damage]
        return self.newest_good([gather(self.ranks, step)[0]])

    def advice(self, which: str) -> str:
        """Return what else there is, where the checkpoint that is wanted is not good."""
        if which != "last":
            good = [step for step in reversed(self.steps) if self.newest_good([step])[0]]
            known = f"good: {', '.join(map(str, good))}" if good else "no other is good"
            return f"--checkpoint {which} is refused; {known}"
        words = "no other checkpoint of the run is good"
        found, _ = replace(self, weights=True).newest_good(self.steps)
        if found and not self.weights:
            words += (
                f"; the weights of step {found.step} are whole: sample them, or start from them "
                f"with --init-from {self.run}"
            )
        return words


def while_there(
    run: str | PathLike[str], which: str, use: Callable[[Checkpoint], T], ranks: Ranks = ALONE
) -> T:
    """Return use(checkpoint), of the weights to generate with of the checkpoint `which`.

    A training may delete or replace the checkpoint before `use` has read it: then the next one is
    opened. Every rank calls it. Raises as open_checkpoint and `use` do, the same on all ranks.
    """
    for last in (False,) * (TRIES - 1) + (True,):
        found = open_checkpoint(run, which, ranks, weights=True)
        try:
            result = agree(ranks, partial(use, found))
        except CorruptError:
            if last or all(gather(ranks, found.is_there())):
                raise
            continue
        if last or not any(gather(ranks, found.is_replaced())):
            break
    return result


def _step_of(run: RunFolder, which: str, steps: list[int]) -> int:
    step = int(which) if which.isdecimal() and len(which) <= 8 else -1
    if which == "best":
        best = read_state(run.step_folder(steps[0])).get("progress", {}).get("best_step")
        step = steps[0] if best is None else best
    if step not in steps:
        known = ", ".join(map(str, sorted(steps)))
        raise UsageError(f"--checkpoint {which}: {run} holds steps {known}; or last, best")
    return step


def load_run(
    run: str | PathLike[str],
    *,
    checkpoint: str | Checkpoint = "last",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernels: str = "auto",
) -> tuple[GPT, Tokenizer, ModelConfig]:
    """Return the model of a run, ready to generate, its tokenizer and its configuration.

    Only the weights are read, the averaged ones where there are any.

    checkpoint: "last", "best", a step, or one that open_checkpoint has opened
    dtype: of the weights and the computation

    Raises UsageError if there is no such run, CorruptError if a file is damaged.
    """
    run = RunFolder(run)
    if isinstance(checkpoint, str):
        options = {"device": device, "dtype": dtype, "kernels": kernels}
        return while_there(
            run, checkpoint, lambda found: load_run(run, checkpoint=found, **options)
        )
    config, found = run.model, checkpoint
    check_model(run, config, found)
    ops = select(
        kernels, device,
        d_model=config.d_model, d_head=config.d_head, vocab_size=config.vocab_size,
    )  # fmt: skip
    model = GPT(config, ops, dtype)
    found.load_into(model)
    tokenizer = run.tokenizer()
    model = model.to(device).eval().requires_grad_(False)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    if model.head.weight.device.type == "cpu":
        _store_by_columns(model)
    return model, tokenizer, config


def check_model(run: str | PathLike[str], config: ModelConfig, found: Checkpoint) -> None:
    """Raise CorruptError, before any memory is taken, unless the run's configuration is that of the
    checkpoint: another run's may have the same names and shapes, and be another model.
    """
    own, held = asdict(config), found.n_elements(found.weights)
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
