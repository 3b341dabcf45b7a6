"""Collect the content of a checkpoint from a run in memory, and load it again."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor

from minillm.checkpoint.find import check_model
from minillm.checkpoint.keep import CheckpointKeeper, Snapshot
from minillm.checkpoint.read import Checkpoint
from minillm.checkpoint.write import sharded_tensors
from minillm.config.resolve import LENGTHS, RESUMABLE
from minillm.distributed.agreement import agree
from minillm.distributed.state_dict import load_into
from minillm.optim.build import state_kinds
from minillm.optim.ema import Average
from minillm.runtime import relative_paths
from minillm.training.budget import StepBudget
from minillm.training.reporter import Reporter
from minillm.training.setup import Setup
from minillm.training.state import TrainState, saved_progress


def snapshot(setup: Setup, state: TrainState, run: Path) -> Snapshot:
    """Return this rank's tensors, by kind and name, and the content of state.json.

    setup: everything that is decided before the first step
    state: state of the run
    run: folder of the run. Paths in the state are relative to it.
    """
    ranks, model = setup.ranks, setup.model
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tensors = sharded_tensors(setup.sharding.pieces(), shapes)
    if state.average:
        tensors["ema"] = {name: state.average.weights[name] for name in ranks.own_share(shapes)}
    settings = {name: getattr(setup.config, name) for name in sorted(RESUMABLE)}
    found = {
        "model": asdict(model.config),
        "settings": relative_paths.stated(run, settings),
        "fixed": setup.decided,
        "launch": ranks.world.launch,
        **state.state_dict(),
    }
    if ranks.size > 1:
        found["shapes"] = {name: list(shape) for name, shape in shapes.items()}
    return tensors, found


def keeper_of(
    setup: Setup, state: TrainState, report: Reporter, run: Path, write: Callable[..., Path]
) -> CheckpointKeeper:
    """Return the keeper of a run's checkpoints. It takes a new snapshot at every save.

    setup: everything that is decided before the first step
    state: state of the run
    report: reporter of the run
    run: folder of the run
    write: write.save, or a function that replaces it in a test
    """
    return CheckpointKeeper(
        run, setup.ranks, partial(snapshot, setup, state, run), state.progress,
        keep_last=setup.config.keep_last, keep_best=setup.config.keep_best,
        say=report.say, saving=report.saving, write=write,
    )  # fmt: skip


def restore(setup: Setup, state: TrainState, past: Checkpoint) -> None:
    """Load weights, optimizer state, average and progress from a checkpoint. Every rank calls it.

    The schedule is not changed. Raises CorruptError if the checkpoint does not fit the model.

    setup: everything that is decided before the first step
    state: state of the run
    past: checkpoint to load
    """
    own = dict(setup.model.named_parameters())
    agree(setup.ranks, lambda: _check_fit(setup, past, own))  # headers alone, before any tensor
    setup.sharding.load(past)
    saved_progress(past)
    state.load(past.state)
    if setup.config.ema:
        state.average = Average(own, setup.config.ema)
        load_into(state.average.weights, past.tensors("ema"), past.folder)


def _check_fit(setup: Setup, past: Checkpoint, own: dict[str, Tensor]) -> None:
    trained = (name for name, p in own.items() if p.requires_grad)
    kinds = state_kinds(setup.config.optimizer, trained, setup.model.matrices())
    check_model(past.folder.parents[1], setup.model.config, past)
    past.check_fit("model", own)
    past.check_optimizer(kinds)
    if setup.config.ema:
        past.check_fit("ema", own)


def resume_schedule(
    state: TrainState, budget: StepBudget, past: Checkpoint, given: frozenset[str]
) -> None:
    """Set the schedule of a run that is resumed from `past`.

    With a new length the schedule is that of a run which had this length from the start, so the
    learning rate may rise again, and early stopping counts from 0 again. A new time limit starts
    now.

    state: state of the run
    budget: number of steps of the run, and its clock
    past: checkpoint to load
    given: settings that the user has changed
    """
    state.timed_from = past.state.get("timed_from", 0.0)
    if "time_limit" in given:
        state.timed_from = state.progress.trained_s
    budget.timed_from = state.timed_from
    if given & LENGTHS:
        state.schedule = budget.schedule(past.step)
        state.progress.evaluations_without_gain = 0
    else:
        state.load_schedule(past.state)
