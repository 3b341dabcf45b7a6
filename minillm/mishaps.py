"""When a step cannot be taken: say which and why, keep its sequences, go back if it goes on.

The records are in the run's bad-steps.jsonl, an object each: step, position (the number of the
batch), why, loss, grad_norm, usual_norm, layer, and the texts of the batch.
"""

import json
import math
from pathlib import Path

import torch

from minillm import checkpoint, runs
from minillm.errors import CorruptError, DivergedError, UnavailableError
from minillm.guard import ROLLBACKS
from minillm.meter import jsonable
from minillm.training import Training, restore, save
from minillm.watch import SAVING

RECORDS = 100  # in the file; a run that never recovers must not fill the disk
BACK = 100  # steps before the first bad one, if there is such a checkpoint, ...
TRIES = 3  # to save, one after the other
SKIPPED = 200  # ... and so many batches are skipped: Chowdhery et al. 2022, section 5.1


def report(t: Training, why: str, loss: float, norm: float) -> str:
    """One line about the step that is left out. Every rank calls it, its gradients still there."""
    layer = _first_to_go(t)
    usual = "none before it" if t.guard.usual is None else f"usually {t.guard.usual:.3g}"
    p, path = t.progress, t.run / "bad-steps.jsonl"
    if t.ranks.rank == 0:
        record = {"step": p.step, "position": p.position, "why": why, "loss": loss,
                  "grad_norm": norm, "usual_norm": t.guard.usual, "layer": layer}  # fmt: skip
        _keep(t, path, record)
    return (
        f"warning   step {p.step} left out: {why} (gradient norm {norm:.3g}, {usual}); "
        f"{layer} went first; its sequences are in {path}"
    )


def _first_to_go(t: Training) -> str:
    """The parameter whose gradient is the first of the backward pass that is not finite; where all
    are, that of the largest.
    """
    names = list(dict(t.model.named_parameters()))
    found = torch.zeros(len(names), dtype=torch.float64)
    for name, gradient in t.sharding.gradients():
        found[names.index(name)] += float(gradient.double().square().sum())
    found = t.ranks.sum(found.to(t.ranks.device)).tolist()
    bad = [name for name, x in zip(names, found, strict=True) if not math.isfinite(x)]
    return bad[-1] if bad else names[found.index(max(found))]


def _keep(t: Training, path: Path, record: dict) -> None:
    """Append the record, with the texts of its batch; a full disk is no reason to end the run."""
    try:
        if path.exists() and len(path.read_bytes().splitlines()) >= RECORDS:
            return
        tokenizer = t.corpus.tokenizer()
        shares = (t.batches.batch(t.progress.position, rank)[0] for rank in range(t.ranks.size))
        record["sequences"] = [tokenizer.decode(row) for x in shares for row in x.tolist()]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(jsonable(record)) + "\n")
    except OSError as error:
        t.meter.say(f"warning   {path}: {error.strerror}; not kept")


def roll_back(t: Training) -> str:
    """Go on from an earlier checkpoint with other data; one line about it. Every rank calls it.

    Without a checkpoint the weights stay, which no bad step has moved. Raises DivergedError when
    this has been done ROLLBACKS times.
    """
    p, guard = t.progress, t.guard
    if guard.rollbacks >= ROLLBACKS:
        raise DivergedError(
            f"step {p.step}: diverged again after {ROLLBACKS} roll-backs; the weights of the last "
            "checkpoint are good; start again with a smaller --learning-rate"
        )
    t.pacer.first = t.saved = None
    with t.watch.elsewhere(SAVING):
        past = _earlier(t)
        if past is not None:
            restore(t, past)
    if past is None:
        t.guard = guard.rolled_back(guard)
    else:
        t.guard, t.progress.ended = guard.rolled_back(t.guard), False
        if t.ranks.rank == 0:
            checkpoint.discard_after(t.run, past.step)
        t.meter.back_to(past.step)
    t.progress.skipped = max(p.position, t.progress.position + SKIPPED) - t.progress.step
    where = "the weights as they are" if past is None else f"step {past.step}"
    return (
        f"warning   too many bad steps: going on from {where}, with the text from batch "
        f"{t.progress.position} on (roll-back {t.guard.rollbacks} of {ROLLBACKS})"
    )


def _earlier(t: Training) -> checkpoint.Checkpoint | None:
    """The newest good checkpoint BACK steps or more before the trouble, else the oldest one."""
    steps = sorted(t.ranks.share(sorted(runs.checkpoints_of(t.run))), reverse=True)
    first = t.progress.step - t.guard.in_a_row
    early = [step for step in steps if step <= first - BACK]
    for step in early or steps[-1:]:
        try:
            return checkpoint.open_checkpoint(t.run, str(step), t.ranks)
        except CorruptError as error:
            t.meter.say(f"warning   {error}")
    return None


def keep(t: Training, final: bool = False) -> None:
    """Save, as far as that can be done; every rank calls it.

    A disk that is full or fails costs a warning, and the next attempt comes when the next is due;
    TRIES in a row, or `final`: the error is raised. Weights that are not finite are not saved but
    rolled back.
    """
    now = (t.progress.step, t.progress.ended)
    if t.saved == now:
        return
    try:
        with t.watch.elsewhere(SAVING):
            save(t)
        t.saved, t.unsaved = now, 0
    except (OSError, UnavailableError) as error:
        t.unsaved += 1
        if final or t.unsaved >= TRIES:
            raise
        why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        t.meter.say(f"warning   step {t.progress.step} is not saved: {why}; training goes on")
    except DivergedError as error:
        if final:
            raise
        t.meter.say(f"warning   {error}")
        t.meter.say(roll_back(t))
