"""How long something takes: warmed up, run many times, and the median told with its spread.

On a GPU it is the device's own time between two events, launches hidden; on a CPU the wall's. What
this room does not do: make the data, which shall be random (zeros are multiplied faster).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LEAST, MOST = 5, 200  # runs of a trial
CLOCK_HZ = 3e9  # of a GPU, at most: by it the stream is held while the host launches
WARM_S = 0.025  # of runs before those that count, until the clocks are up


@dataclass(frozen=True)
class Trial:
    """What is timed: `run`, given what `prepare` made anew for each run, untimed."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None

    def once(self) -> Any:
        """What one run returns."""
        return self.run(self.prepare())


@dataclass(frozen=True)
class Timing:
    """The median of `runs` times, in microseconds, and their spread, see `middle`."""

    median_us: float
    spread_us: float
    runs: int


def middle(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the distance from the 20th to the 80th of 100."""
    fifths = statistics.quantiles(values, n=5) if len(values) > 1 else [values[0]] * 4
    return statistics.median(values), fifths[-1] - fifths[0]


def summary(seconds: Sequence[float]) -> Timing:
    """Median and spread of the times of one trial."""
    median, spread = middle(seconds)
    return Timing(1e6 * median, 1e6 * spread, len(seconds))


def on_cpu(
    trials: Sequence[Trial], seconds: float, now: Callable[[], float] = time.perf_counter
) -> list[Timing]:
    """The trials in turn, round after round, so that a neighbour's load falls on all alike.

    Each is run once untimed; then there are rounds until they have taken `seconds` a trial.
    """
    for trial in trials:
        trial.once()
    taken: list[list[float]] = [[] for _ in trials]
    end = now() + seconds * len(trials)
    while len(taken[0]) < LEAST or (now() < end and len(taken[0]) < MOST):
        for trial, times in zip(trials, taken, strict=True):
            given = trial.prepare()
            start = now()
            trial.run(given)
            times.append(now() - start)
    return [summary(times) for times in taken]


def on_gpu(
    trial: Trial,
    seconds: float,
    device: torch.device,
    now: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Device time of a trial, warmed up, as often as it fits into `seconds` without the flushes.

    Before each run the level-2 cache is flushed, so that inputs come from memory, as they do in a
    model. Then the stream is held until the host has launched all of the run; else short kernels
    would be timed by how fast Python is.
    Trials are timed one after another, not in turn: a GPU is taken to be without a neighbour.
    """
    with torch.cuda.device(device):
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size // 4
        written, read = (torch.zeros(size, dtype=torch.float32, device=device) for _ in range(2))
        host_s, whole_s = _warm_up(trial, device, now)
        hold = int(CLOCK_HZ * (1.5 * host_s + 20e-6))
        events = []
        for _ in range(min(MOST, max(LEAST, int(seconds / whole_s)))):
            given = trial.prepare()
            # Read last: lines left written would be taken to memory at the cost of the run.
            written.zero_()
            read.sum()
            torch.cuda._sleep(hold)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            trial.run(given)
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(device)
        return summary([start.elapsed_time(end) / 1e3 for start, end in events])


def _warm_up(trial: Trial, device: torch.device, now: Callable[[], float]) -> tuple[float, float]:
    """Run for WARM_S, but three times at least, and once before, which may compile.

    Returns how long the host takes to launch a run, and until the run is done; medians.
    """
    trial.once()
    torch.cuda.synchronize(device)
    host, whole = [], []
    warm = now() + WARM_S
    while len(host) < 3 or now() < warm:
        begin = now()
        given = trial.prepare()
        torch.cuda.synchronize(device)
        start = now()
        trial.run(given)
        host.append(now() - start)
        torch.cuda.synchronize(device)
        whole.append(now() - begin)
    return statistics.median(host), statistics.median(whole)
