"""Train a decoder on text: from raw files to a run folder you can sample from.

python train.py                                  this Python's own source files, two minutes
python train.py --data my.txt --time-limit 10m   your text, your time
python train.py --resume                         continue the newest run
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from minillm.flags import train as flags
from minillm.runtime import program
from minillm.runtime.launch import World, answer, launched, shell_command

if __name__ == "__main__":  # help and refusals do not need torch, whose import takes seconds
    answer("train.py", flags.parse, sys.argv[1:])

from minillm.checkpoint.keep import CheckpointKeeper
from minillm.checkpoint.run_folder import RunFolder
from minillm.checkpoint.write import save, take_up
from minillm.config.flags import Settings
from minillm.distributed.agreement import agree
from minillm.distributed.ranks import Ranks, connected, first_to_say, leave, with_launch_name
from minillm.runtime import console, device
from minillm.training.begin import begin, config_text
from minillm.training.budget import is_due
from minillm.training.build import build
from minillm.training.metrics import StepResult
from minillm.training.new_run import begin_run
from minillm.training.reporter import Reporter
from minillm.training.samples import show_sample, take_sample
from minillm.training.setup import Setup
from minillm.training.snapshot import keeper_of
from minillm.training.state import TrainState
from minillm.training.steps import steps
from minillm.training.summary import announce, farewell, nothing_left, reporter_of
from minillm.training.validation import evaluate_split, note_best, report_row
from minillm.training.watchdog import Stopped


def main(argv: Sequence[str], world: World | None = None, **replaced: Callable) -> None:
    """Train as the command line says, together with the other ranks that torchrun has started.

    argv: words of the command line
    world: place of this process in the launch; None: as torchrun says
    replaced: parts of `train` that a test replaces
    """
    args = flags.parse(argv)
    world = with_launch_name(launched()) if world is None else world
    if args.print_config:
        settings, _ = begin(args, world)
        if world.rank == 0:
            print(config_text(settings))
        return
    try:
        train_from(args, world, **replaced)
    except Stopped as stop:
        raise SystemExit(128 + stop.signal) from None


def train_from(args: Namespace, world: World | None = None, **replaced: Callable) -> Path:
    """Train as the flags say, on all ranks of the launch, and return the folder of the run.

    args: flags as flags.train.parse returns them
    world, replaced: as `main` takes them

    Raises Stopped when a signal has ended the run, which is saved then.
    """
    world = with_launch_name(launched()) if world is None else world
    settings, run = begin(args, world)
    local_rank = world.local_rank if world.size > 1 else None
    where = device.pick_device(settings.train.device, local_rank)
    with connected(world, where, settings.train.rank_timeout) as ranks:
        return train(settings, run, ranks, **replaced)


def train(
    settings: Settings,
    run: RunFolder | None,
    ranks: Ranks,
    *,
    steps: Callable[..., Iterator[StepResult]] = steps,
    evaluate: Callable[..., dict[str, Any]] = evaluate_split,
    write: Callable[..., Path] = save,
) -> Path:
    """Train a new run, or resume `run` from its last checkpoint; return its folder.

    settings: settings of the run
    run: folder of the run to resume; None for a new run
    ranks: ranks that train together
    steps, evaluate, write: yield the steps, evaluate the model, write a checkpoint
    """
    with ExitStack() as held:
        if run is not None:  # from here on no other process may write it
            lock = agree(ranks, lambda: take_up(run) if ranks.rank == 0 else None)
            held.enter_context(lock or nullcontext())
        with console.busy("reading the text, building the model ...", ranks.rank == 0):
            setup, state, budget = build(settings, run, ranks)
        if state.is_done(setup.config.early_stop):
            ranks.say(nothing_left(setup, state, run.path))
            return run.path
        state.progress.ended = False
        folder = run.path if run else begin_run(held, setup, settings)
        for line in announce(setup, state, budget, folder):
            ranks.say(line)
        report = held.enter_context(reporter_of(setup, state, budget, folder))
        keeper = keeper_of(setup, state, report, folder, write)
        with _saved_when_stopped(state, keeper, report):
            if setup.asked_lengths:  # if the process is killed at once, the new length is kept
                keeper.save(state.progress)
            for result in steps(setup, state, budget, keeper, report):
                row = result.row()
                _after_step(setup, state, keeper, report, row, evaluate)
                if "val_loss" in row and _stops_early(setup, state, keeper, report):
                    break
            _finish(setup, state, keeper, report, evaluate)
    return folder


@contextmanager
def _saved_when_stopped(
    state: TrainState, keeper: CheckpointKeeper, report: Reporter
) -> Iterator[None]:
    """Save a last checkpoint if a signal stops the `with` block, and raise Stopped again."""
    try:
        yield
    except Stopped as stop:
        keeper.save(state.progress, final=True)
        resume = shell_command("train", "--resume", keeper.run)
        step = state.progress.step
        report.say(f"stopped by {stop} at step {step}, which is saved; continue: {resume}")
        raise


def _after_step(
    setup: Setup,
    state: TrainState,
    keeper: CheckpointKeeper,
    report: Reporter,
    row: dict[str, Any],
    evaluate: Callable[..., dict[str, Any]],
) -> None:
    """After a step: evaluate, log, sample and save where it is due. Adds the evaluation to `row`.

    What is due after the last step is left to `_finish`.
    """
    config, progress, more = setup.config, state.progress, not state.is_last
    improved = False
    if is_due(config.eval_every, progress.step) and more:
        with report.aside():
            row |= evaluate(setup, state, report, config.eval_batches)
        improved = note_best(progress, row)
    if is_due(config.log_every, progress.step) or not more or "val_loss" in row:
        report_row(setup, state, report, row)
    with report.aside():
        if is_due(config.sample_every, progress.step) and more:
            text = take_sample(setup, state, report, keeper.run)
            show_sample(setup, state, report, text, sys.stderr)
        if is_due(config.save_every, progress.step) and more or improved and config.keep_best:
            keeper.save(progress)


def _stops_early(
    setup: Setup, state: TrainState, keeper: CheckpointKeeper, report: Reporter
) -> bool:
    """Return whether early stopping ends the run after an evaluation, and say so."""
    evaluations = state.progress.evaluations_without_gain
    if not 0 < setup.config.early_stop <= evaluations or keeper.weights_are_bad:
        return False
    report.say(f"stopping early: {evaluations} evaluations without gain")
    return True


def _finish(
    setup: Setup,
    state: TrainState,
    keeper: CheckpointKeeper,
    report: Reporter,
    evaluate: Callable[..., dict[str, Any]],
) -> None:
    """Evaluate and save for the last time, and print a sample and the result.

    The best checkpoint is always chosen by evaluations on the same part of the split.
    """
    config, progress = setup.config, state.progress
    row = {"step": progress.step, "tokens": progress.tokens}
    report.ending()
    with report.aside():
        row |= evaluate(setup, state, report, config.final_eval_batches, may_stop=True)
        same = not config.eval_every or config.eval_batches == config.final_eval_batches
        found = row
        if not same:
            found = evaluate(setup, state, report, config.eval_batches, may_stop=True)
        # If an evaluation of this very step has stopped the run early, it is counted already.
        note_best(progress, found, counts=state.is_last)
        report.outlook.final_batches = 0
        report_row(setup, state, report, row)
        progress.ended = True
        keeper.save(progress, final=True)
        text = take_sample(setup, state, report, keeper.run)
    report.close()
    show_sample(setup, state, report, text, sys.stdout)
    setup.ranks.say(farewell(state, row, keeper.run))


if __name__ == "__main__":
    sys.exit(leave(program.run("train.py", main, sys.argv[1:], first_to_say)))
