"""When a step cannot be taken: say which and why, keep its texts, go back if it goes on; and save,
as far as that can be done.

The records are in the run's bad-steps.jsonl, an object each: step (as in metrics.jsonl), position
(the number of the batch), why, loss, grad_norm, usual_norm, layer, and the texts of the batch.
"""

import math
from pathlib import Path

import torch

from minillm.checkpoint import read, write
from minillm.checkpoint.run_folder import RunFolder
from minillm.distributed.agreement import agree
from minillm.errors import CorruptError, DivergedError, UnavailableError
from minillm.runtime.json_text import json_text
from minillm.training.divergence import ROLLBACKS
from minillm.training.metrics import append, jsonable
from minillm.training.state import Training, restore, save
from minillm.training.watchdog import SAVING

RECORDS = 100  # in the file; a run that never recovers must not fill the disk
BACK = 100  # steps before the first bad one, if there is such a checkpoint, ...
SKIPPED = 200  # ... and so many batches are skipped: Chowdhery et al. 2022, section 5.1
TRIES = 3  # to save, one after the other


def report(t: Training, why: str, loss: float, norm: float) -> str:
    """One line about the coming step, which is left out. Every rank calls it, before the gradients
    are dropped.
    """
    layer, step = _first_to_go(t), t.progress.step + 1
    usual = "none before it" if t.guard.usual is None else f"usually {t.guard.usual:.3g}"
    path = t.run / "bad-steps.jsonl"
    if t.ranks.rank == 0:
        record = {"step": step, "position": t.progress.position, "why": why, "loss": loss,
                  "grad_norm": norm, "usual_norm": t.guard.usual, "layer": layer}  # fmt: skip
        _keep(t, path, record)
    return (
        f"warning   step {step} left out: {why} ({usual}); {layer} went first; its texts are in "
        f"{path}"
    )


def _first_to_go(t: Training) -> str:
    """The parameter whose gradient is the first of the backward pass that is not finite; where all
    are, that of the largest.
    """
    names = list(dict(t.model.named_parameters()))
    found = torch.zeros(len(names), dtype=torch.float64)
    for name, gradient in t.sharding.gradients():
        found[names.index(name)] += float(gradient.cpu().double().square().sum())  # MPS has no fp64
    found = t.ranks.sum(found.to(t.ranks.sums_on)).tolist()
    bad = [name for name, x in zip(names, found, strict=True) if not math.isfinite(x)]
    return bad[-1] if bad else names[found.index(max(found))]


def _keep(t: Training, path: Path, record: dict) -> None:
    """Append the record, with the texts of its batch. If that fails, it is no reason to end."""
    try:
        if path.exists() and len(path.read_bytes().splitlines()) >= RECORDS:
            return
        tokenizer = t.corpus.tokenizer()
        shares = (t.batches.batch(t.progress.position, rank)[0] for rank in range(t.ranks.size))
        record["sequences"] = [tokenizer.decode(row) for x in shares for row in x.tolist()]
        append(path, json_text(jsonable(record)) + "\n")
    except (OSError, CorruptError) as error:
        t.meter.say(f"warning   {path}: not kept: {_told(error)}")


def roll_back(t: Training) -> str:
    """Go on from an earlier checkpoint with other data; one line about it. Every rank calls it.

    The schedule stays as it is. Without a checkpoint the weights stay, too, which no bad step has
    moved. Raises DivergedError when this has been done ROLLBACKS times.
    """
    t.pacer.first = t.saved = None
    with t.watch.elsewhere(SAVING):
        if t.guard.rollbacks >= ROLLBACKS:
            raise DivergedError(
                f"step {t.progress.step}: diverged again after {ROLLBACKS} roll-backs; start again "
                "with a smaller --learning-rate"
            )
        bad, guard, past = t.progress.position, t.guard, _earlier(t)
        if past is None:
            _require_finite(t)
            t.guard = guard.rolled_back(guard)
        else:
            restore(t, past)
            t.guard, t.progress.ended = guard.rolled_back(t.guard), False
            agree(t.ranks, lambda: t.ranks.rank or write.discard_after(t.run, past.step))
            t.meter.back_to(past.step)
    t.progress.skipped = max(bad, t.progress.position + SKIPPED) - t.progress.step
    where = "the weights as they are" if past is None else f"step {past.step}"
    return (
        f"warning   too many bad steps: going on from {where}, with the text from batch "
        f"{t.progress.position} on (roll-back {t.guard.rollbacks} of {ROLLBACKS})"
    )


def _require_finite(t: Training) -> None:
    """Raise DivergedError, on all ranks, if there is nothing to go back to but spoilt weights."""
    fine = all(bool(p.isfinite().all()) for p in t.model.parameters())
    if not t.ranks.minimum(float(fine)):
        raise DivergedError(
            f"step {t.progress.step}: weights are not finite, and there is no checkpoint to go "
            "back to; start again with a smaller --learning-rate, and --save-every"
        )


def _earlier(t: Training) -> read.Checkpoint | None:
    """The newest good checkpoint BACK steps or more before the trouble, else the oldest good."""
    run = RunFolder(t.run)
    steps = t.ranks.broadcast(sorted(run.checkpoints(), reverse=True))
    first = t.progress.step - t.guard.in_a_row
    early = [step for step in steps if step <= first - BACK]
    late = [step for step in steps if step > first - BACK]
    for step in (*early, *reversed(late)):
        try:
            return read.verified(run.step_folder(step), step, t.ranks)
        except CorruptError as error:
            t.meter.say(f"warning   {error}")
    return None


def keep(t: Training, final: bool = False) -> None:
    """Save, as far as that can be done; every rank calls it.

    A disk that is full or fails costs a warning, and the next attempt comes when the next is due;
    TRIES in a row, or `final`: the error is raised. Weights that are not finite are not saved but
    rolled back.
    """
    p = t.progress
    now = (p.step, p.ended)
    if t.saved == now:
        return
    try:
        with t.watch.elsewhere(SAVING), t.meter.doing("saving"):
            save(t)
        t.saved, t.unsaved, t.best = now, 0, (p.best_loss, p.best_step)
    except (OSError, UnavailableError) as error:
        t.unsaved += 1
        if final or t.unsaved >= TRIES:
            raise
        if t.config.keep_best:  # the best that is there must not be given up for this one
            p.best_loss, p.best_step = t.best
        t.meter.say(f"warning   step {p.step} is not saved: {_told(error)}; training goes on")
    except DivergedError as error:
        if final:
            raise
        t.meter.say(f"warning   {error}")
        t.meter.say(roll_back(t))


def _told(error: Exception) -> str:
    """What went wrong, and where."""
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
