"""State of a training run, which a checkpoint holds besides weights and optimizer state."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from minillm.checkpoint.read import Checkpoint
from minillm.checkpoint.schema import RESUMED, Progress, check_state
from minillm.distributed.ranks import Ranks
from minillm.errors import CorruptError
from minillm.optim.ema import Average
from minillm.optim.loss_scale import LossScale
from minillm.optim.schedule import Schedule
from minillm.training.divergence import DivergenceGuard


@dataclass(kw_only=True)
class TrainState:
    """State of a run that changes with every step. A resumed run starts from a saved one.

    progress: step, tokens, best loss
    schedule: learning rate by step, and the number of steps
    timed_from: `progress.trained_s` at which the time limit was asked for
    divergence: history of gradient norms and of skipped steps
    loss_scale: scale of the loss in fp16; None for other dtypes
    average: moving average of the weights; None without --ema
    """

    progress: Progress
    schedule: Schedule
    timed_from: float = 0.0
    divergence: DivergenceGuard = field(default_factory=DivergenceGuard)
    loss_scale: LossScale | None = None
    average: Average | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON, under the names of state.json. The average is a tensor file."""
        return {
            "progress": asdict(self.progress),
            "pace": self.schedule.pace,
            "timed_from": self.timed_from,
            "scale": asdict(self.loss_scale) if self.loss_scale else None,
            "guard": asdict(self.divergence),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Take progress, divergence history and loss scale from a state.json.

        The schedule stays: a roll-back keeps it, a resumed run restores it with `load_schedule`.
        """
        self.progress = Progress(**saved["progress"])
        self.divergence = DivergenceGuard(**saved.get("guard", {}))
        if self.loss_scale and saved.get("scale"):
            self.loss_scale = LossScale(**saved["scale"])

    def load_schedule(self, saved: dict[str, Any]) -> None:
        """Take the steps of the schedule from a state.json."""
        self.schedule = with_pace(self.schedule, saved["pace"])

    @property
    def share_done(self) -> float:
        """The share of the schedule that is done, 0 to 1."""
        return self.schedule.progress(self.progress.step)

    @property
    def is_last(self) -> bool:
        """True if all steps of the schedule are done."""
        return self.progress.step >= self.schedule.steps

    def is_done(self, early_stop: int) -> bool:
        """Return whether nothing is left to do: the steps are done, or early stopping ended them.

        early_stop: evaluations without gain after which training ends (0: never)
        """
        stopped_early = 0 < early_stop <= self.progress.evaluations_without_gain
        return self.progress.ended and (self.is_last or stopped_early)

    def averaged(self) -> AbstractContextManager[None]:
        """Put the averaged weights, if there are any, into the model for the `with` block."""
        return self.average.swapped_in() if self.average else nullcontext()


def saved_progress(past: Checkpoint | None) -> Progress:
    """Return the progress that a checkpoint holds, or that of a new run.

    Raises CorruptError unless its state.json has everything that a resumed run needs.
    """
    if past is None:
        return Progress()
    check_state(past.folder / "state.json", past.state, RESUMED)
    try:
        if past.state.get("scale"):
            LossScale(**past.state["scale"])
        DivergenceGuard(**past.state.get("guard", {}))
        return Progress(**past.state["progress"])
    except TypeError as error:
        raise CorruptError(f"{past.folder}/state.json: {error}") from None


def shared_schedule(schedule: Schedule, ranks: Ranks) -> Schedule:
    """Return rank 0's schedule on every rank. Their clocks differ; their steps must not.

    schedule: schedule of this rank
    ranks: ranks that train together
    """
    return schedule if ranks.size == 1 else with_pace(schedule, ranks.broadcast(schedule.pace))


def with_pace(schedule: Schedule, pace: list) -> Schedule:
    """Return a schedule with another pace, read from JSON.

    schedule: schedule to change
    pace: knots (step, progress), as JSON has them
    """
    return replace(schedule, pace=tuple(map(tuple, pace)))
