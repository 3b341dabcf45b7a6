"""Guarded training steps: gradients, clipping, loss scale, skipped steps and roll-backs.

`steps` is the loop that every kind of training shares. It takes the loss as an argument; what is
done between the steps (evaluations, checkpoints) is up to the caller.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.checkpoint.keep import CheckpointKeeper
from minillm.config.train import ModelConfig, TrainConfig
from minillm.model.recurrence import draw, state_keys
from minillm.model.size import flops_per_token
from minillm.optim.build import set_learning_rate
from minillm.optim.clip import clip_factor
from minillm.runtime import device
from minillm.training.budget import StepBudget
from minillm.training.gradients import Loss, accumulate, next_token_loss
from minillm.training.metrics import StepResult
from minillm.training.recovery import log_skipped_step, roll_back
from minillm.training.reporter import Reporter
from minillm.training.setup import Setup
from minillm.training.state import TrainState, shared_schedule


class Gradients(NamedTuple):
    """Gradients that wait in the model: what was measured, and how to use them.

    norm: (), fp32, on the device
    scale: factor by which the gradients are too large
    """

    result: StepResult
    norm: Tensor
    scale: float


def steps(
    setup: Setup,
    state: TrainState,
    budget: StepBudget,
    keeper: CheckpointKeeper,
    report: Reporter,
    *,
    loss: Loss = next_token_loss,
    accumulate: Callable[..., Tensor] = accumulate,
) -> Iterator[StepResult]:
    """Train step by step until the schedule ends; yield the measurements after each step.

    A step that would spoil the weights is skipped. After too many skipped steps, or if `keeper`
    finds weights that are not finite, the run is rolled back, and the steps continue from there.

    setup: everything that is decided before the first step
    state: state of the run
    budget: number of steps of the run, and its clock
    keeper: keeper of the run's checkpoints
    report: reporter of the run
    loss: loss of a micro-batch, see `next_token_loss`
    accumulate: computes the gradients, see `accumulate`

    Raises Stopped, after a step, if any rank was asked to stop, and DivergedError if roll-backs do
    not help.
    """
    while state.progress.step < state.schedule.steps:
        gradients = _compute_gradients(setup, state, loss, accumulate)
        _apply_or_skip(setup, state, gradients, keeper.run, report.say)
        result = gradients.result
        state.progress.step, state.progress.tokens = result.step, result.tokens
        state.progress.trained_s = budget.trained_s
        if state.divergence.has_diverged:
            _recover(setup, state, budget, keeper, report)
            continue
        state.schedule = budget.adjusted(state.schedule, result.step)
        if setup.config.time_limit is not None:
            state.schedule = shared_schedule(state.schedule, setup.ranks)
        report.step(result.batch_tokens, state.schedule.steps, result.flops_per_token, result.loss)
        yield result
        if keeper.weights_are_bad:
            _recover(setup, state, budget, keeper, report)
        report.raise_if_stopped(setup.ranks)


def _recover(
    setup: Setup, state: TrainState, budget: StepBudget, keeper: CheckpointKeeper, report: Reporter
) -> None:
    """Roll the run back, and report it; the time that this takes is no time of a step."""
    budget.restart_clock()
    with report.saving_patience():
        back = roll_back(setup, state, keeper)
        if back.step is not None:
            report.back_to(back.step)
    report.say(back.line)


def _compute_gradients(
    setup: Setup, state: TrainState, loss: Loss, accumulate: Callable[..., Tensor]
) -> Gradients:
    """Compute the gradients of the next step. Everything that is drawn is a function of the step.

    So a resumed run drops and draws the same.
    """
    config, shape, ranks = setup.config, setup.model.config, setup.ranks
    sharding, progress = setup.sharding, state.progress
    rate = state.schedule.learning_rate(progress.step)
    set_learning_rate(sharding.optimizers, rate)
    if shape.dropout:
        seed = config.seed * 1_000_003 + progress.position + 998_244_353 * ranks.rank
        torch.manual_seed(seed % 2**63)
    tokens, targets = setup.batches.batch(progress.position, ranks.rank)
    recurrences = draw_recurrences(config, shape, progress.position, state.share_done)
    first = progress.position * config.batch_size + ranks.rank * setup.rows
    keys = state_keys(config.seed, torch.arange(first, first + setup.rows))
    batch = (x.to(ranks.device) for x in (tokens, targets, keys))
    scale = state.loss_scale.value / sharding.weight if state.loss_scale else 1.0
    mean = accumulate(sharding, *batch, setup.micro_batch, recurrences, scale, loss)
    norm = sharding.squares().sqrt().float().to(ranks.device) / scale
    result = StepResult(
        step=progress.step + 1,
        tokens=progress.tokens + tokens.numel() * ranks.size,
        batch_tokens=tokens.numel() * ranks.size,
        loss=float(mean),
        learning_rate=rate,
        grad_norm=float(norm),
        peak_memory_mib=_peak_memory_mib(ranks.device),
        flops_per_token=mean_flops(shape, recurrences),
        loss_scale=scale * sharding.weight if state.loss_scale else None,
        recurrence=sum(recurrences) / len(recurrences) if shape.recurrent else None,
    )
    return Gradients(result, norm, scale)


def _apply_or_skip(
    setup: Setup, state: TrainState, gradients: Gradients, run: Path, say: Callable[[str], None]
) -> None:
    """Step the optimizers, unless the gradients would spoil the weights; then drop the gradients.

    In fp16, gradients that overflow because of the loss scale are dropped without a message, and
    the scale is halved.

    run: folder of the run, which has the log of skipped steps
    say: prints a line
    """
    result, scaler, sharding = gradients.result, state.loss_scale, setup.sharding
    if scaler is not None and scaler.is_to_blame(result.loss, result.grad_norm):
        sharding.drop()
        return
    why = state.divergence.reason_to_skip(result.loss, result.grad_norm)
    if why:
        for line in log_skipped_step(setup, state, run, why, result.loss, result.grad_norm):
            say(line)
        sharding.drop()
        return
    sharding.step(clip_factor(gradients.norm, setup.config.grad_clip, gradients.scale))
    if scaler:
        scaler.went_well()
    if state.average:
        state.average.update(result.step)


def draw_recurrences(
    config: TrainConfig, shape: ModelConfig, position: int, share_done: float
) -> list[int | None]:
    """Return how often the core runs for each group of sequences of a step; [None] without a core.

    config: settings of the training
    shape: configuration of the model
    position: number of the batch
    share_done: share of the run that is done, 0 to 1. A curriculum raises the mean from 1 to its
        final value in the first quarter.
    """
    if shape.recurrent is None:
        return [None]
    mean = float(shape.mean_recurrence)
    if config.recurrence_curriculum:
        mean = 1 + (mean - 1) * min(1.0, 4 * share_done)
    return draw(config.seed, position, config.recurrence_groups, mean, shape.max_recurrence)


def mean_flops(shape: ModelConfig, recurrences: Sequence[int | None]) -> float:
    """Return the FLOPs per token of a step, averaged over its groups of sequences.

    shape: configuration of the model
    recurrences: recurrence of each group of sequences
    """
    return sum(flops_per_token(shape, r) for r in recurrences) / len(recurrences)


def _peak_memory_mib(where: torch.device) -> float | None:
    """Return the peak memory of this process in MiB; None if the system does not say."""
    peak = device.peak_memory(where)
    return None if peak is None else peak / 2**20
