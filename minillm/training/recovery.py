"""Recovery: log skipped steps and their text, and roll back after too many of them.

The log is the run's bad-steps.jsonl, one object per skipped step: step (as in metrics.jsonl),
position (number of the batch), why, loss, grad_norm, usual_norm, layer, and the texts of the batch.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch

from minillm.checkpoint.keep import CheckpointKeeper, in_words
from minillm.errors import CorruptError, DivergedError, parameter
from minillm.runtime.json_text import json_text
from minillm.training.divergence import ROLLBACKS
from minillm.training.metrics import append, jsonable
from minillm.training.setup import Setup
from minillm.training.snapshot import restore
from minillm.training.state import TrainState

RECORDS = 100  # in the log; a run that never recovers must not fill the disk
SKIPPED = 200  # batches that a roll-back skips: Chowdhery et al. 2022, section 5.1


def log_skipped_step(
    setup: Setup, state: TrainState, run: Path, why: str, loss: float, norm: float
) -> list[str]:
    """Log the next step, which is skipped; return the lines to print about it.

    Every rank calls it, while the gradients are still there.

    setup: everything that is decided before the first step
    state: state of the run
    run: folder of the run
    why: reason, in words
    loss, norm: mean loss (nats per token) and gradient norm of the step
    """
    layer, step, usual = _worst_layer(setup), state.progress.step + 1, state.divergence.usual_norm
    path, lines = run / "bad-steps.jsonl", []
    if setup.ranks.rank == 0:
        record = {"step": step, "position": state.progress.position, "why": why, "loss": loss,
                  "grad_norm": norm, "usual_norm": usual, "layer": layer}  # fmt: skip
        try:
            _append(path, record, setup)
        except (OSError, CorruptError) as error:  # no reason to end the run
            lines.append(f"warning   {path}: not kept: {in_words(error)}")
    before = "none before it" if usual is None else f"usually {usual:.3g}"
    return [
        *lines,
        f"warning   step {step} left out: {why} ({before}); {layer} went first; its texts are in "
        f"{path}",
    ]


def _worst_layer(setup: Setup) -> str:
    """Return the parameter whose gradient is the first of the backward pass that is not finite.

    If all gradients are finite, return the one with the largest.
    """
    ranks, names = setup.ranks, list(dict(setup.model.named_parameters()))
    found = torch.zeros(len(names), dtype=torch.float64)
    for name, gradient in setup.sharding.gradients():
        found[names.index(name)] += float(gradient.cpu().double().square().sum())  # MPS has no fp64
    found = ranks.sum(found.to(ranks.sums_on)).tolist()
    bad = [name for name, x in zip(names, found, strict=True) if not math.isfinite(x)]
    return bad[-1] if bad else names[found.index(max(found))]


def _append(path: Path, record: dict, setup: Setup) -> None:
    """Append the record with the texts of its batch, unless the log is full."""
    if path.exists() and len(path.read_bytes().splitlines()) >= RECORDS:
        return
    tokenizer, batches = setup.corpus.tokenizer(), setup.batches
    shares = (batches.batch(record["position"], rank)[0] for rank in range(setup.ranks.size))
    record["sequences"] = [tokenizer.decode(row) for x in shares for row in x.tolist()]
    append(path, json_text(jsonable(record)) + "\n")


class RollBack(NamedTuple):
    """Result of a roll-back.

    step: step of the checkpoint; None if there was none and the weights did not change
    line: text that says so
    """

    step: int | None
    line: str


def roll_back(setup: Setup, state: TrainState, keeper: CheckpointKeeper) -> RollBack:
    """Roll back to an earlier checkpoint and skip the data in between. Every rank calls it.

    The schedule does not change. Without a good checkpoint the weights do not change either,
    because no skipped step has changed them.

    setup: everything that is decided before the first step
    state: state of the run
    keeper: keeper of the run's checkpoints

    Raises DivergedError after ROLLBACKS roll-backs, or if the weights themselves are not finite and
    there is no checkpoint.
    """
    progress, guard = state.progress, state.divergence
    if guard.rollbacks >= ROLLBACKS:
        raise DivergedError(
            f"step {progress.step}: diverged again after {ROLLBACKS} roll-backs; start again with "
            f"a smaller {parameter('learning_rate')}"
        )
    bad = progress.position
    past = keeper.roll_back_source(progress.step - guard.in_a_row)
    if past is None:
        _require_finite_weights(setup, progress.step)
        state.divergence = guard.rolled_back(guard)
    else:
        restore(setup, state, past)
        state.divergence = guard.rolled_back(state.divergence)
        state.progress.ended = False
    keeper.rolled_back(past and past.step, state.progress)
    progress = state.progress
    progress.skipped = max(bad, progress.position + SKIPPED) - progress.step
    where = "the weights as they are" if past is None else f"step {past.step}"
    return RollBack(
        past and past.step,
        f"warning   too many bad steps: going on from {where}, with the text from batch "
        f"{progress.position} on (roll-back {state.divergence.rollbacks} of {ROLLBACKS})",
    )


def _require_finite_weights(setup: Setup, step: int) -> None:
    """Raise DivergedError, on all ranks, if a weight is not finite."""
    fine = all(bool(p.isfinite().all()) for p in setup.model.parameters())
    if not setup.ranks.minimum(float(fine)):
        raise DivergedError(
            f"step {step}: weights are not finite, and there is no checkpoint to roll back to; "
            f"start again with a smaller {parameter('learning_rate')}, and with "
            f"{parameter('save_every')}"
        )
