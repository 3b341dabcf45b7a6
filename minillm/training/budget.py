"""Decide how many steps a run has: the number asked for, or what the time limit allows."""

import math
import time

from minillm.config.train import TrainConfig
from minillm.data.batches import Batches
from minillm.optim.schedule import Schedule, plain

CHECK_S = 2.0  # seconds between two estimates, ...
CHECK_SHARE = 0.05  # ... or this share of the time limit, if that is less
TOLERANCE = 0.02  # share of the remaining steps; smaller changes of the estimate are noise


def requested_steps(config: TrainConfig, batches: Batches) -> int | None:
    """Return the steps that --steps or --epochs ask for; one epoch if no length is given.

    config: settings of the training
    batches: batches of the training split

    Returns None if only --time-limit limits the run.
    """
    if config.steps is not None:
        return config.steps
    if config.epochs is None and config.time_limit is not None:
        return None
    return max(1, math.ceil((config.epochs or 1.0) * batches.n_windows / config.batch_size))


class StepBudget:
    """Number of steps of a run, and the clock that keeps the schedule's end on the deadline.

    requested: steps that were asked for; None: the time limit alone counts
    trained_s: seconds that the run had trained before this process
    guess_s: seconds per step, before any step was timed

    timed_from: the trained_s at which the time limit was asked for
    """

    def __init__(
        self, config: TrainConfig, requested: int | None, trained_s: float, guess_s: float
    ) -> None:
        self.config, self.requested, self.guess_s = config, requested, guess_s
        self.start = time.perf_counter() - trained_s
        self.first: tuple[int, float] | None = None
        self.checked = self.timed_from = 0.0

    @property
    def trained_s(self) -> float:
        """Seconds of training since the run's first step, over all its processes."""
        return time.perf_counter() - self.start

    @property
    def limit(self) -> float | None:
        """The trained_s at which the run has to end; None: no time limit."""
        wish = self.config.time_limit
        return None if wish is None else self.timed_from + wish

    def schedule(self, step: int = 0) -> Schedule:
        """Return the schedule as estimated after `step`, before this process has timed a step.

        There is at least one more step, however little time is left, unless all steps are done.
        """
        c = self.config
        steps = self.affordable(step, self.guess_s)
        if self.requested is None or self.requested > step:
            steps = max(steps, step + 1)
        return plain(
            c.schedule, c.learning_rate, c.min_learning_rate, c.warmup, c.decay_fraction, steps,
        )  # fmt: skip

    def affordable(self, step: int, step_s: float) -> int:
        """Return the steps of the whole run if each one after `step` takes `step_s` seconds.

        step: number of steps that are done
        step_s: seconds per step
        """
        if self.limit is None:
            return self.requested
        fits = step + max(0, int((self.limit - self.trained_s) / step_s))
        return max(1, fits if self.requested is None else min(fits, self.requested))

    def restart_clock(self) -> None:
        """Time the steps again from the next one on, as after a roll-back."""
        self.first = None

    def adjusted(self, schedule: Schedule, step: int) -> Schedule:
        """Return the schedule, changed after `step` if it would no longer end on the deadline.

        The estimate is made after 1, 2, 4, ... timed steps, and whenever the last one is old.

        schedule: learning rates and number of steps so far
        step: number of steps that are done
        """
        if self.limit is None:
            return schedule
        now = self.trained_s
        if self.first is None:  # the first step of a process includes what happens only once
            self.first = (step, now)
            return schedule
        if now >= self.limit:
            return schedule.repaced(step, step) if step < schedule.steps else schedule
        timed = step - self.first[0]
        is_power = timed & (timed - 1) == 0
        patience = min(CHECK_S, CHECK_SHARE * self.config.time_limit)
        if not is_power and now - self.checked < patience:
            return schedule
        self.checked = now
        step_s = (now - self.first[1]) / timed
        steps = self.affordable(step, step_s)
        if abs(steps - schedule.steps) <= TOLERANCE * max(1, schedule.steps - step):
            return schedule
        return schedule.repaced(step, steps)


def is_due(every: int, step: int) -> bool:
    """Return whether an action done every `every` steps (0: never) is due after `step`.

    every: number of steps between two of these actions; 0: never
    step: number of the step that is done
    """
    return every > 0 and step % every == 0
