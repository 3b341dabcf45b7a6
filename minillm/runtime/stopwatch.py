"""Time a function: warm up, run it many times, and return the median with its spread.

On a GPU the device measures the time between two events, without the launches. On a CPU it is wall
time. Data should be random, as zeros are multiplied faster.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LEAST, MOST = 5, 200  # smallest and largest number of runs of a trial
CLOCK_HZ = 3e9  # highest clock of a GPU; the stream waits by it while the host launches
WARM_S = 0.025  # seconds of runs that do not count, until the clocks are up


@dataclass(frozen=True)
class Trial:
    """A function to time.

    run: the function; it receives the result of `prepare`
    prepare: called before each run, and not timed
    """

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None

    def once(self) -> Any:
        """Return the result of one run."""
        return self.run(self.prepare())


@dataclass(frozen=True)
class Timing:
    """Time of a function.

    median_us: median of the times in microseconds
    spread_us: their spread in microseconds, see `middle`
    runs: number of times
    """

    median_us: float
    spread_us: float
    runs: int


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Return the median, and the distance from the 20th to the 80th percentile."""
    fifths = statistics.quantiles(values, n=5) if len(values) > 1 else [values[0]] * 4
    return statistics.median(values), fifths[-1] - fifths[0]


def summary(seconds: Sequence[float]) -> Timing:
    """Return median and spread of the times of one trial, given in seconds."""
    median, spread = middle(seconds)
    return Timing(1e6 * median, 1e6 * spread, len(seconds))


def on_cpu(
    trials: Sequence[Trial], seconds: float, now: Callable[[], float] = time.perf_counter
) -> list[Timing]:
    """Time several functions in turn, round after round, so that other load affects all of them.

    Each is run once without timing it.

    trials: the functions
    seconds: time to spend on each, in seconds
    now: clock in seconds
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
    """Return the device time of a function on a GPU.

    Before each run the level-2 cache is flushed, so that inputs come from memory, as they do in a
    model. Then the stream waits until the host has launched the whole run. Otherwise the time of
    short kernels would depend on the speed of Python. Trials are not timed in turn, as it is
    assumed that no other process uses the GPU.

    trial: the function
    seconds: time to spend on it in seconds, without the flushes
    device: the GPU
    now: clock in seconds
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
    """Run once, which may compile, and then for WARM_S, at least three times.

    Returns the median times in seconds that the host takes to launch a run, and until it is done.
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
