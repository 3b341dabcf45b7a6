"""Learning-rate schedules: the learning rate as a pure function of the step.

A run with a time limit learns only on the way how many steps it has. Each time that number changes,
the pace (how far along the schedule each step stands) gets another knot. The knots are saved, so
that a resumed run has the same rate at the same step.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule: warm-up, then a curve from `peak` to `minimum`.

    kind: the curve: cosine, linear, wsd or constant
    warmup: number of steps of the warm-up
    decay_fraction: the part of the whole run, at its end, in which wsd decays
    pace: knots (step, progress) of a piecewise linear function; the last is (steps, 1.0)
    """

    kind: str
    peak: float
    minimum: float
    warmup: int
    decay_fraction: float
    pace: tuple[tuple[int, float], ...]

    @property
    def steps(self) -> int:
        """The number of steps in the whole run, as decided so far."""
        return self.pace[-1][0]

    def progress(self, step: int) -> float:
        """Return how much of the run is done before `step`, in [0, 1]."""
        right = min(max(1, bisect_right([s for s, _ in self.pace], step)), len(self.pace) - 1)
        (s0, p0), (s1, p1) = self.pace[right - 1], self.pace[right]
        return min(1.0, p0 + (p1 - p0) * (step - s0) / max(1, s1 - s0))

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step 0, 1, ...

            warm-up:  peak (step + 1) / (warmup + 1)
            cosine:   minimum + (peak - minimum) (1 + cos(pi x)) / 2
            linear:   peak + (minimum - peak) x
            wsd:      peak until p = 1 - decay_fraction, then linear in p to the minimum
            constant: peak
        x: progress since the end of the warm-up, 0 to 1
        p: progress since the start of the run, 0 to 1; a decay that would begin within the warm-up
            begins at its end instead

        Source: cosine: Loshchilov & Hutter 2016, arXiv:1608.03983, eq. 5; wsd: Hu et al. 2024,
        arXiv:2404.06395, eq. 1.
        """
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        warm = self.progress(self.warmup)
        p = self.progress(step)
        x = (p - warm) / max(1e-12, 1 - warm)
        span = self.peak - self.minimum
        if self.kind == "cosine":
            return self.minimum + span * (1 + math.cos(math.pi * x)) / 2
        if self.kind == "linear":
            return self.peak - span * x
        if self.kind == "wsd":
            start = max(warm, 1 - self.decay_fraction)
            return self.peak - span * max(0.0, p - start) / max(1e-12, 1 - start)
        return self.peak

    def repaced(self, step: int, steps: int) -> "Schedule":
        """Return the schedule that is the same up to `step` and ends after `steps`.

        step: number of steps done
        steps: new number of steps in the whole run
        """
        past = [knot for knot in self.pace if knot[0] < step]
        here = [(step, self.progress(step))] if step > 0 else [(0, 0.0)]
        return replace(self, pace=(*past, *here, (max(steps, step + 1), 1.0)))


def plain(
    kind: str, peak: float, minimum: float, warmup: int, decay_fraction: float, steps: int
) -> Schedule:
    """Return the schedule of a run whose number of steps is known from the start.

    kind, peak, minimum, warmup, decay_fraction: see Schedule
    steps: number of steps in the run
    """
    return Schedule(kind, peak, minimum, warmup, decay_fraction, ((0, 0.0), (steps, 1.0)))
