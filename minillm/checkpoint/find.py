"""Find and load the checkpoint to read: the last one, the best one or that of a given step.

    runs/NAME/checkpoints/step-00001000/{model,optimizer,ema}-00001-of-00001.safetensors,
                                        state.json, manifest.json

The manifest holds the SHA-256 of every file and of itself. Each of N ranks writes its tensors into
files KIND-0000R-of-0000N, and any number of ranks can read them, each rank what it needs. No file
is ever a pickle.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from typing import TypeVar

import torch

from minillm.checkpoint.read import Checkpoint, read_state, verified
from minillm.checkpoint.run_folder import TRIES, RunFolder
from minillm.config.train import ModelConfig
from minillm.data.tokenizer import Tokenizer
from minillm.distributed.agreement import agree, gather
from minillm.distributed.ranks import ALONE, Ranks
from minillm.errors import CorruptError, UsageError, parameter
from minillm.model.gpt import GPT
from minillm.model.size import n_parameters
from minillm.ops import select
from minillm.runtime.launch import shell_command
from minillm.runtime.program import one_line

T = TypeVar("T")
SMALL = 10_000_000  # a number of parameters that fits any memory


def open_checkpoint(
    run: str | PathLike[str],
    which: str = "last",
    ranks: Ranks = ALONE,
    say: Callable[[str], None] | None = None,
    weights: bool = False,
) -> Checkpoint:
    """Return a checkpoint, after its files have been checked against their digests.

    run: folder of the run
    which: "last", "best" or a step number
    ranks: ranks that open it together
    say: prints a warning; None: one line on standard error
    weights: check and open only the weights to generate with; the optimiser's files may be missing

    If the last checkpoint is damaged, the newest good one before it is returned, with a warning for
    each damaged one. "best" or a step number is never replaced by another checkpoint. If a training
    deletes checkpoints meanwhile, the search starts again.

    Every rank calls it and checks its share of the files. Raises, on all ranks, UsageError if there
    is no such run or checkpoint, CorruptError if the one asked for, or every one, is damaged.
    """
    run = RunFolder(run)
    for _ in range(TRIES):
        there = gather(ranks, agree(ranks, lambda: _all_steps(run)))[0]
        steps = [step for step, _ in there]
        search = _Search(run, steps, ranks, weights)
        found, damages = search.newest_good(steps) if which == "last" else search.asked_for(which)
        if not damages or gather(ranks, agree(ranks, lambda: _all_steps(run)))[0] == there:
            break
    if found is None:
        raise CorruptError(f"{damages[0]}; {search.advice(which)}")
    for damage in damages:
        (say or ranks.say)(one_line(f"warning: {damage}; going on from step {found.step}"))
    return found


def _all_steps(run: RunFolder) -> list[list]:
    """Return RunFolder.listing, the newest first. Raise UsageError if there is no checkpoint."""
    there = sorted(map(list, run.require().listing()), key=lambda one: -one[0])
    if not there:
        raise UsageError(
            f"{run} holds no checkpoint yet; train on: {shell_command('train', '--resume', run)}"
        )
    return there


@dataclass(frozen=True)
class _Search:
    """A search among the checkpoints that a run has at one moment.

    steps: steps of all checkpoints, the newest first
    weights: see open_checkpoint
    """

    run: RunFolder
    steps: list[int]
    ranks: Ranks
    weights: bool

    def newest_good(self, steps: list[int]) -> tuple[Checkpoint | None, list[CorruptError]]:
        """Return the first good checkpoint of `steps`, if any, and the damages found before it."""
        damages = []
        for step in steps:
            try:
                return verified(self.run.step_folder(step), step, self.ranks, self.weights), damages
            except CorruptError as damage:
                damages.append(damage)
        return None, damages

    def asked_for(self, which: str) -> tuple[Checkpoint | None, list[CorruptError]]:
        """Return the checkpoint "best" or of a step number, or the damage found in it."""
        try:
            step = agree(self.ranks, lambda: _step_of(self.run, which, self.steps))
        except CorruptError as damage:
            return None, [damage]
        return self.newest_good([gather(self.ranks, step)[0]])

    def advice(self, which: str) -> str:
        """Return what the user can do if the checkpoint that was asked for is damaged."""
        if which != "last":
            good = [step for step in reversed(self.steps) if self.newest_good([step])[0]]
            known = f"good: {', '.join(map(str, good))}" if good else "no other is good"
            return f"{parameter('checkpoint')} {which} is refused; {known}"
        words = "no other checkpoint of the run is good"
        found, _ = replace(self, weights=True).newest_good(self.steps)
        if found and not self.weights:
            words += (
                f"; the weights of step {found.step} are whole: sample them, or start from them "
                f"with {parameter('init_from')} {self.run}"
            )
        return words


def while_there(
    run: str | PathLike[str], which: str, use: Callable[[Checkpoint], T], ranks: Ranks = ALONE
) -> T:
    """Return use(checkpoint). Repeat it with another checkpoint if a training deletes the first.

    run: folder of the run
    which: see open_checkpoint
    use: reads the weights of the checkpoint; its other files need not be there
    ranks: ranks that open it together

    Every rank calls it. Raises, on all ranks, what open_checkpoint and `use` raise.
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
        raise UsageError(
            f"{parameter('checkpoint')} {which}: {run} holds steps {known}; or last, best"
        )
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

    Only the weights are read: the averaged ones if there are any.

    run: folder of the run
    checkpoint: "last", "best", a step number, or a checkpoint that is open already
    device: device of the returned model
    dtype: dtype of the weights and of the computation
    kernels: "auto", "eager" or "triton"

    Raises UsageError if there is no such run or checkpoint, CorruptError if a file is damaged.
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
    """Raise CorruptError unless the run's configuration is that of the checkpoint.

    A checkpoint of another run may have tensors of the same names and shapes, and still be another
    model. This is found before any memory is allocated.

    run: folder of the run, which the error names
    config: configuration of the model in the run's config.json
    found: the opened checkpoint
    """
    own, stored = asdict(config), found.n_elements(found.weights)
    for name, value in found.state.get("model", {}).items():
        if value != own.get(name):
            raise CorruptError(
                f"{run}/config.json: states {name} {own.get(name)!r}, step {found.step} was "
                f"trained with {value!r}; is it another run's?"
            )
    if n_parameters(config) > 2 * stored + SMALL:
        raise CorruptError(
            f"{run}/config.json: states {n_parameters(config):,} parameters, {found.folder} holds "
            f"{stored:,}"
        )


def _store_by_columns(model: GPT) -> None:
    """Store the matrices by columns instead of by rows. Their values do not change.

    In decoding, a CPU multiplies one row by such a matrix 1.5 to 2.5 times faster, and several rows
    as fast (benchmarks/README.md).
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()
