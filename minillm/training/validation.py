"""Evaluate a run on its validation split, note its best step, and warn of a failing recurrence."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import isfinite, nan
from typing import Any

import torch

from minillm.checkpoint.schema import Progress
from minillm.data.batches import evaluation_windows
from minillm.errors import DivergedError
from minillm.model.size import n_parameters
from minillm.training import recurrence_metrics
from minillm.training.evaluate import Evaluation, evaluate
from minillm.training.reporter import Reporter
from minillm.training.setup import Setup
from minillm.training.state import TrainState

RECURRENCE_WINDOWS = 64  # windows of the evaluation by recurrence
# Tokens per parameter. In benchmarks/recurrence the core of nano's twin gained 0.01 nats after half
# a token and 0.04 after two.
GROWN = 3


@torch.no_grad()
def evaluate_split(
    setup: Setup, state: TrainState, report: Reporter, batches: int, may_stop: bool = False
) -> dict[str, Any]:
    """Evaluate the model, with its averaged weights if there are any, on the validation split.

    setup: everything that is decided before the first step
    state: state of the run
    report: reporter of the run
    batches: number of batches, spread evenly over the split; 0: the whole split
    may_stop: whether a signal breaks the evaluation off, which raises Stopped

    Returns val_loss (nats per token), val_bpb (bits per byte of raw text), val_tokens (targets)
    and, for recurrent models, what recurrence_metrics.measure finds; nothing without a split.
    """
    corpus, ranks = setup.corpus, setup.ranks
    if corpus.tokens["val"] < 2:
        return {}
    limit = batches * setup.config.batch_size or None
    windows = evaluation_windows(corpus, "val", setup.model.config.seq_len, limit)
    poll = partial(report.raise_if_stopped, ranks) if may_stop else report.alive
    with state.averaged():
        with _shown(setup, report, windows, poll) as counted:
            try:
                result = evaluate(setup.model, windows, setup.micro_batch, ranks, counted)
            except DivergedError as error:  # the row says null
                report.say(f"warning   step {state.progress.step}: {error.with_flags()}")
                result = Evaluation(nan, 0)
        recurrent = setup.model.config.recurrent
        found = _evaluate_recurrence(setup, report, result.loss) if recurrent else {}
    bpb = result.bits_per_byte(corpus.tokens["val"], corpus.bytes["val"])
    return {"val_loss": result.loss, "val_bpb": bpb, "val_tokens": result.tokens, **found}


def _evaluate_recurrence(setup: Setup, report: Reporter, loss: float) -> dict[str, Any]:
    """Return the losses by recurrence and the signs of a failing recurrence.

    loss: loss at the mean recurrence, on all windows of the evaluation
    """
    shape, ranks = setup.model.config, setup.ranks
    windows = evaluation_windows(setup.corpus, "val", shape.seq_len, RECURRENCE_WINDOWS)
    shown = _shown(setup, report, windows, report.alive, "evaluating by r", "evaluating")
    with setup.sharding.gathered(), shown as counted:
        found = recurrence_metrics.measure(setup.model, windows, setup.micro_batch, ranks, counted)
    return recurrence_metrics.anchored(found, shape.mean_recurrence, loss)


@contextmanager
def _shown(
    setup: Setup, report: Reporter, windows: Sequence, poll: Callable[[], None],
    what: str = "evaluating", of: str | None = None,
) -> Iterator[Callable[[], None]]:  # fmt: skip
    """Show the progress of an evaluation; yield the function to call before each batch."""

    def counted() -> None:
        report.tick()
        poll()

    batches = -(-len(windows) // (setup.micro_batch * setup.ranks.size))
    with report.doing(what, batches, of):
        yield counted


def report_row(setup: Setup, state: TrainState, report: Reporter, row: dict[str, Any]) -> None:
    """Report a row of metrics, the losses by recurrence in it, and new warnings about them.

    setup: everything that is decided before the first step
    state: state of the run
    report: reporter of the run
    row: row of metrics.jsonl
    """
    report.row(row)
    if "val_loss_at_r" in row:
        report.say(recurrence_metrics.line(row, setup.model.config.mean_recurrence))
        for kind, line in _recurrence_warnings(setup, state, row).items():
            report.warn_once(kind, line)


def _recurrence_warnings(setup: Setup, state: TrainState, row: dict[str, Any]) -> dict[str, str]:
    """Return the warnings about a failing recurrence in a row of metrics, by kind.

    The first tenth of a run has no warnings. Every young model hardly uses its core. Therefore an
    ignored core is a warning only in the second half of the run and after GROWN tokens per
    parameter.
    """
    shape, progress, steps = setup.model.config, state.progress, state.schedule.steps
    is_early = progress.step < steps / 10
    is_grown = progress.step >= steps / 2 and progress.tokens >= GROWN * n_parameters(shape)
    found = recurrence_metrics.alarms(row, shape.mean_recurrence)
    return {
        kind: line
        for kind, line in found.items()
        if (is_grown if kind == "ignored" else not is_early)
    }


def note_best(progress: Progress, row: dict[str, Any], counts: bool = True) -> bool:
    """Note the validation loss in `row`, if there is one; return whether it is the best of the run.

    progress: progress of the run
    row: row of metrics.jsonl
    counts: whether an evaluation without gain is counted
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
