"""Evaluate a run on its validation split, and say what is found."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import isfinite, nan

import torch

from minillm.data.batches import evaluation_windows
from minillm.errors import DivergedError
from minillm.model.size import n_parameters
from minillm.training import recurrence_metrics as ladder
from minillm.training.evaluate import Evaluation, evaluate
from minillm.training.state import Progress, Training, averaged, heed

LADDER_WINDOWS = 64  # that recurrence is judged on, at every evaluation
# Tokens a parameter. In benchmarks/recurrence the core of nano's twin gained 0.01 nats after half a
# token and 0.04 after two.
GROWN = 3


@torch.no_grad()
def judge(t: Training, batches: int, to_the_end: bool = True) -> dict[str, float]:
    """Loss on `batches` batches of the validation split, spread evenly; 0: on the whole of it.

    to_the_end: else a signal breaks it off: Stopped.

    Returns val_loss (nats a token), val_bpb (bits a byte of raw text) and val_tokens (how many were
    predicted); nothing without a split.
    """
    if t.corpus.tokens["val"] < 2:
        return {}
    limit = batches * t.config.batch_size or None
    windows = evaluation_windows(t.corpus, "val", t.model.config.seq_len, limit)
    poll = t.watch.alive if to_the_end else partial(heed, t)
    with averaged(t):
        with _evaluating(t, windows, poll) as counted:
            try:
                result = evaluate(t.model, windows, t.micro, t.ranks, counted)
            except DivergedError as error:  # the row says null
                t.meter.say(f"warning   step {t.progress.step}: {error}")
                result = Evaluation(nan, 0)
        found = _judge_recurrence(t, result.loss) if t.model.config.recurrent else {}
    bpb = result.bits_per_byte(t.corpus.tokens["val"], t.corpus.bytes["val"])
    return {"val_loss": result.loss, "val_bpb": bpb, "val_tokens": result.tokens, **found}


def _judge_recurrence(t: Training, loss: float) -> dict:
    """Return the loss by recurrence and the signs of its failing.

    loss: at the mean recurrence, on all windows of the evaluation.
    """
    few = evaluation_windows(t.corpus, "val", t.model.config.seq_len, LADDER_WINDOWS)
    poll, of = t.watch.alive, "evaluating"
    with t.sharding.gathered(), _evaluating(t, few, poll, "evaluating by r", of) as counted:
        found = ladder.measure(t.model, few, t.micro, t.ranks, counted)
    return ladder.anchored(found, t.model.config.mean_recurrence, loss)


@contextmanager
def _evaluating(
    t: Training, windows: Sequence, poll: Callable[[], None], what: str = "evaluating",
    of: str | None = None,
) -> Iterator[Callable[[], None]]:  # fmt: skip
    """Show the progress of an evaluation; yield what it must call before each batch."""

    def counted() -> None:
        t.meter.tick()
        poll()

    batches = -(-len(windows) // (t.micro * t.ranks.size))
    with t.meter.doing(what, batches, of):
        yield counted


def findings(t: Training, row: dict) -> list[str]:
    """Return the lines about what an evaluation found of the recurrence, each warning once.

    There are no warnings in the first tenth of a run. That the recurrence is hardly used is true of
    every young model, and is said of grown ones alone: in the second half of the run, after GROWN
    tokens for each parameter.
    """
    if "val_loss_at_r" not in row:
        return []
    mean, step, steps = t.model.config.mean_recurrence, t.progress.step, t.plan.steps
    lines = [ladder.line(row, mean)]
    grown = step >= steps / 2 and t.progress.tokens >= GROWN * n_parameters(t.model.config)
    for kind, line in ladder.alarms(row, mean).items():
        early = not grown if kind == "ignored" else step < steps / 10
        if not early and kind not in t.warned:
            t.warned.add(kind)
            lines.append(f"warning   {line}")
    return lines


def note_best(progress: Progress, row: dict[str, float], counts: bool = True) -> bool:
    """Note the validation loss in `row`, if any; return whether it is the best of the run.

    counts: whether it is counted if it is an evaluation without gain.
    """
    loss = row.get("val_loss")
    if loss is None:
        return False
    if not (progress.best_loss is None or loss < progress.best_loss) or not isfinite(loss):
        progress.evaluations_without_gain += counts
        return False
    progress.best_loss, progress.best_step = loss, progress.step
    progress.evaluations_without_gain = 0
    return True
