"""How many steps a run has: as many as asked for, or as many as its time allows."""

import math
import time

from minillm.config.train import TrainConfig
from minillm.data.batches import Batches
from minillm.optim import schedule
from minillm.optim.schedule import Schedule

LOOK_S = 2.0  # seconds between two looks at the clock, ...
LOOK_SHARE = 0.05  # ... or this share of the time limit, if that is less
TOLERANCE = 0.02  # of the remaining steps: smaller changes of the estimate are noise


def wished_steps(config: TrainConfig, batches: Batches) -> int | None:
    """The steps that --steps, --epochs or neither (one epoch) ask for; None: only time limits."""
    if config.steps is not None:
        return config.steps
    if config.epochs is None and config.time_limit is not None:
        return None
    return max(1, math.ceil((config.epochs or 1.0) * batches.n_windows / config.batch_size))


class Pacer:
    """Watches the clock and keeps the schedule's end on the deadline.

    trained_s: seconds that the run had trained before this process.    guess_s: seconds a step,
    before any was timed.    timed_from: the trained_s at which the time limit was asked for.
    """

    def __init__(
        self, config: TrainConfig, wished: int | None, trained_s: float, guess_s: float
    ) -> None:
        self.config, self.wished, self.guess_s = config, wished, guess_s
        self.start = time.perf_counter() - trained_s
        self.first: tuple[int, float] | None = None
        self.looked = self.timed_from = 0.0

    @property
    def trained_s(self) -> float:
        """Seconds since the run's first step, over all its processes."""
        return time.perf_counter() - self.start

    @property
    def limit(self) -> float | None:
        """The trained_s at which the run shall end; None: no time limit."""
        wish = self.config.time_limit
        return None if wish is None else self.timed_from + wish

    def schedule(self, step: int = 0) -> Schedule:
        """Return the schedule as it looks from `step`, before this process has timed one.

        However little time is left, there is one more step, unless the steps are used up.
        """
        c = self.config
        steps = self.affordable(step, self.guess_s)
        if self.wished is None or self.wished > step:
            steps = max(steps, step + 1)
        return schedule.plain(
            c.schedule, c.learning_rate, c.min_learning_rate, c.warmup, c.decay_fraction, steps,
        )  # fmt: skip

    def affordable(self, step: int, step_s: float) -> int:
        """Steps in the whole run if each from `step` on takes `step_s` seconds."""
        if self.limit is None:
            return self.wished
        fits = step + max(0, int((self.limit - self.trained_s) / step_s))
        return max(1, fits if self.wished is None else min(fits, self.wished))

    def keep_to_time(self, plan: Schedule, step: int) -> Schedule:
        """`plan`, or after `step` one that ends on the deadline if `plan` no longer would."""
        if self.limit is None:
            return plan
        now = self.trained_s
        if self.first is None:  # the first step in a process pays for what happens once
            self.first = (step, now)
            return plan
        if now >= self.limit:
            return plan.repaced(step, step) if step < plan.steps else plan
        timed = step - self.first[0]
        patience = min(LOOK_S, LOOK_SHARE * self.config.time_limit)
        if timed & (timed - 1) and now - self.looked < patience:
            return plan  # neither after 1, 2, 4, ... steps nor long after the last look
        self.looked = now
        step_s = (now - self.first[1]) / timed
        steps = self.affordable(step, step_s)
        if abs(steps - plan.steps) <= TOLERANCE * max(1, plan.steps - step):
            return plan
        return plan.repaced(step, steps)


def due(every: int, step: int) -> bool:
    """Return whether an action done every `every` steps (0: never) is due after `step`."""
    return every > 0 and step % every == 0
