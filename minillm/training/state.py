"""What the loop of train.py works with: a run in memory, saved and restored."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from minillm.checkpoint import find, write
from minillm.checkpoint.read import Checkpoint
from minillm.checkpoint.schema import RESUMED, check_state
from minillm.checkpoint.write import sharded_tensors
from minillm.config.resolve import LENGTHS, RESUMABLE
from minillm.config.train import TrainConfig
from minillm.data.batches import Batches
from minillm.data.shards import Corpus
from minillm.distributed.agreement import agree
from minillm.distributed.ranks import Ranks
from minillm.distributed.state_dict import load_into
from minillm.distributed.strategies import Sharding
from minillm.errors import CorruptError
from minillm.model.gpt import GPT
from minillm.model.recurrence import draw
from minillm.optim.build import state_kinds
from minillm.optim.ema import Average
from minillm.optim.loss_scale import LossScale
from minillm.optim.schedule import Schedule
from minillm.runtime import device as world, relative_paths as places
from minillm.training.budget import Pacer
from minillm.training.divergence import Guard
from minillm.training.metrics import Meter
from minillm.training.watchdog import EASY, Stopped, Watch


@dataclass
class Progress:
    """What a run has come to; saved with each checkpoint. Losses in nats a token, times in s.

    skipped: batches of text that a roll-back has passed over.    ended: all is done, the last
    evaluation too.
    """

    step: int = 0
    tokens: int = 0
    trained_s: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    skipped: int = 0
    ended: bool = False

    @property
    def position(self) -> int:
        """The number of the coming batch, of which its text and all that is drawn are functions."""
        return self.step + self.skipped


@dataclass
class Training:
    """A run in memory.

    fixed: what was decided once, at its start: threads, dtype, micro-batch.    micro: sequences of
    a micro-batch, as this number of ranks divides them.    meter: there once there is a folder.
    saved: the progress (step, ended) that was saved last.    unsaved: failed attempts since.
    best: the loss and the step of the best checkpoint that there is.
    warned: the kinds of ladder.alarms that have been printed.
    asked: those of LENGTHS that a resumed run was given on its command line.
    timed_from: as Pacer's.
    """

    run: Path | None
    config: TrainConfig
    corpus: Corpus
    batches: Batches
    sharding: Sharding
    progress: Progress
    pacer: Pacer
    plan: Schedule
    fixed: dict[str, int | str]
    micro: int
    watch: Watch
    why_threads: str
    scale: LossScale | None = None
    average: Average | None = None
    guard: Guard = field(default_factory=Guard)
    meter: Meter | None = None
    unsaved: int = 0
    saved: tuple[int, bool] | None = None
    best: tuple[float | None, int | None] = (None, None)
    warned: set[str] = field(default_factory=set)
    asked: frozenset[str] = frozenset()
    timed_from: float = 0.0

    @property
    def model(self) -> GPT:
        """The decoder, on this rank."""
        return self.sharding.model

    @property
    def ranks(self) -> Ranks:
        """Who trains it."""
        return self.sharding.ranks

    @property
    def is_done(self) -> bool:
        """Whether nothing is left: all steps are done, or early stopping has ended the run."""
        p, patience = self.progress, self.config.early_stop
        return p.ended and (p.step >= self.plan.steps or 0 < patience <= p.evaluations_without_gain)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside is no part of a step's time."""
        with self.meter.paused(), self.watch.elsewhere(EASY):
            yield


def save(t: Training) -> None:
    """Write a checkpoint, and drop those that are no longer to be kept. Every rank calls it."""
    shapes = {name: tuple(p.shape) for name, p in t.model.named_parameters()}
    tensors = sharded_tensors(t.sharding.pieces(), shapes)
    if t.average:
        tensors["ema"] = {name: t.average.weights[name] for name in t.ranks.own_share(shapes)}
    settings = {name: getattr(t.config, name) for name in sorted(RESUMABLE)}
    state = {
        "model": asdict(t.model.config),
        "progress": asdict(t.progress),
        "settings": places.stated(t.run, settings),
        "pace": t.plan.pace,
        "timed_from": t.timed_from,
        "fixed": t.fixed,
        "scale": asdict(t.scale) if t.scale else None,
        "guard": asdict(t.guard),
        "launch": t.ranks.world.launch,
    }
    if t.ranks.size > 1:
        state["shapes"] = {name: list(shape) for name, shape in shapes.items()}
    write.save(t.run, t.progress.step, tensors, state, t.ranks)
    if t.ranks.rank == 0:
        try:
            best = t.progress.best_step if t.config.keep_best else None
            write.prune(t.run, t.config.keep_last, best)
        except OSError as error:  # what is too many now is deleted the next time
            t.ranks.say(f"warning   {error.filename}: not deleted: {error.strerror}")


def restore(t: Training, past: Checkpoint) -> None:
    """Put the weights, the optimisers and the progress back to where `past` left them."""
    own = dict(t.model.named_parameters())
    trained = (name for name, p in own.items() if p.requires_grad)
    kinds = state_kinds(t.config.optimizer, trained, t.model.matrices())
    agree(t.ranks, lambda: _check_fit(t, past, own, kinds))  # headers alone, before a tensor
    t.sharding.load(past)
    t.progress = progress_of(past)
    t.guard = Guard(**past.state.get("guard", {}))
    if t.scale and past.state.get("scale"):
        t.scale = LossScale(**past.state["scale"])
    if t.config.ema:
        t.average = Average(dict(t.model.named_parameters()), t.config.ema)
        load_into(t.average.weights, past.tensors("ema"), past.folder)
    t.best = t.progress.best_loss, t.progress.best_step


def _check_fit(t: Training, past: Checkpoint, own: dict, kinds: dict) -> None:
    find.check_model(t.run, t.model.config, past)
    past.check_fit("model", own)
    past.check_optimizer(kinds)
    if t.config.ema:
        past.check_fit("ema", own)


def progress_of(past: Checkpoint | None) -> Progress:
    """How far the run had come by then; None: it is at its start."""
    if past is None:
        return Progress()
    check_state(past.folder / "state.json", past.state, RESUMED)
    try:
        if past.state.get("scale"):
            LossScale(**past.state["scale"])
        Guard(**past.state.get("guard", {}))
        return Progress(**past.state["progress"])
    except TypeError as error:
        raise CorruptError(f"{past.folder}/state.json: {error}") from None


def replan(t: Training, past: Checkpoint, given: frozenset[str]) -> None:
    """Set the schedule of a run that goes on from `past`. given: what the user changed.

    With a new length it is that of a run which was meant to be so long from the start: the rate
    may go up again. Then early stopping counts from 0 again. A new time limit begins now.
    """
    t.timed_from = past.state.get("timed_from", 0.0)
    if "time_limit" in given:
        t.timed_from = t.progress.trained_s
    t.pacer.timed_from = t.timed_from
    if given & LENGTHS:
        t.plan = t.pacer.schedule(past.step)
        t.progress.evaluations_without_gain = 0
    else:
        t.plan = replace(t.plan, pace=tuple(map(tuple, past.state["pace"])))


def share_plan(t: Training) -> None:
    """The schedule of rank 0's clock for all ranks."""
    if t.ranks.size > 1:
        t.plan = replace(t.plan, pace=tuple(map(tuple, t.ranks.broadcast(t.plan.pace))))


def averaged(t: Training) -> AbstractContextManager[None]:
    """Put the averaged weights into the model, if there are any, for the `with` block."""
    return t.average.swapped_in() if t.average else nullcontext()


def heed(t: Training) -> None:
    """A sign of life, and Stopped on all ranks if any was asked to end, or has lost its reader."""
    t.watch.alive()
    if t.meter.lost_reader or t.ranks.lost_reader:
        t.watch.note_lost_reader()
    if number := t.watch.asked(t.ranks):
        raise Stopped(number)


def recurrences(t: Training) -> list[int | None]:
    """How often the core runs for each group of sequences of the coming step; [None] without."""
    c, model = t.config, t.model.config
    if model.recurrent is None:
        return [None]
    mean = float(model.mean_recurrence)
    if c.recurrence_curriculum:
        mean = 1 + (mean - 1) * min(1.0, 4 * t.plan.progress(t.progress.step))
    return draw(c.seed, t.progress.position, c.recurrence_groups, mean, model.max_recurrence)


def peak_mib(device: torch.device) -> float | None:
    """Peak memory of this process in MiB, where the system says."""
    peak = world.peak_memory(device)
    return None if peak is None else peak / 2**20
