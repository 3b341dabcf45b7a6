"""Estimate the remaining time of a run from the times of its steps and pauses so far."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

RECENT = 50  # steps whose mean time is the estimate for the next ones
ENOUGH = 3  # timed steps that an estimate needs
FORWARD = 1 / 3  # share of a step's time that is its forward pass, all that an evaluation needs


def _since_now() -> Callable[[], float]:
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


@dataclass
class Outlook:
    """Estimate of the remaining time of a run. All times are in seconds.

    elapsed: returns how long the run has been trained, over all its processes
    limit: the elapsed time at which the time limit ends the training, before the last evaluation
    every: activity ("evaluating", "saving", "sampling") -> number of steps between two of them (0:
        only at the end)
    batches: batches of an evaluation before the end
    final_batches: batches of the evaluations at the end
    parts: batches of that size in a step
    steps: times of the latest steps
    took: last time of each activity, without its batches
    batch: last time of a batch of an evaluation
    """

    elapsed: Callable[[], float] = field(default_factory=_since_now)
    limit: float | None = None
    every: dict[str, int] = field(default_factory=dict)
    batches: int = 0
    final_batches: int = 0
    parts: int = 1
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    took: dict[str, float] = field(default_factory=dict)
    batch: float | None = None

    def remaining(self, step: int, steps: int) -> float | None:
        """Return the time that is left after `step` of `steps`; None if it is not known yet.

        step: number of steps that are done
        steps: steps of the whole run
        """
        each = self.step_s
        if each is None and (step < steps or self.batch is None and self.final_batches):
            return None
        if step >= steps:
            return self._end(each)
        left = (steps - step) * each
        for what, every in self.every.items():
            # What is due at the last step belongs to the end.
            times = (steps - 1) // every - step // every if every else 0
            left += times * self._pause(what, each)
        if self.limit is not None:
            left = min(left, max(0.0, self.limit - self.elapsed()))
        return left + self._end(each)

    @property
    def step_s(self) -> float | None:
        """Mean time of the latest steps; None before ENOUGH were timed."""
        return sum(self.steps) / len(self.steps) if len(self.steps) >= ENOUGH else None

    def _end(self, each: float | None) -> float:
        """Return how long the last evaluation, checkpoint and sample will take."""
        others = sum(self.took.get(what, 0.0) for what in self.every)
        return self.final_batches * self._batch(each) + others

    def _pause(self, what: str, each: float) -> float:
        batches = self.batches if what == "evaluating" else 0
        return self.took.get(what, 0.0) + batches * self._batch(each)

    def _batch(self, each: float | None) -> float:
        return self.batch if self.batch is not None else (each or 0.0) * FORWARD / self.parts
