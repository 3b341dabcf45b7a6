"""Timing of a GPU, on a machine without one: the order of the calls that it gets."""

import contextlib
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.runtime import stopwatch

CPU = torch.device("cpu")
CACHE = 4096  # bytes of the level-2 cache


class Told(TorchDispatchMode):
    """Log of calls: ("zero_", tensor) for each operator, and what a test adds."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            self.log.append((func.overloadpacket.__name__, args[0]))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda as `on_gpu` sees it.    told: the log.    clock: the host's, in seconds."""
    told, clock = Told(), [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.log.append(("record", None))

        def elapsed_time(self, other: "Event") -> float:
            return 1.0

    fakes = {
        "device": lambda device: contextlib.nullcontext(),
        "get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=CACHE),
        "synchronize": lambda device: told.log.append(("wait", None)),
        "_sleep": lambda cycles: told.log.append(("hold", cycles)),
        "Event": Event,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def takes(name: str, seconds: float):
        def work(_=None) -> None:
            told.log.append((name, None))
            clock[0] += seconds

        return work

    def measure(run_s: float, prepare_s: float, seconds: float) -> tuple[list, stopwatch.Timing]:
        trial = stopwatch.Trial(takes("run", run_s), takes("prepare", prepare_s))
        with told:
            found = stopwatch.on_gpu(trial, seconds, CPU, now=lambda: clock[0])
        return told.log, found

    return measure


def timed(log: list) -> list:
    """Return the calls of each run that counts, from its preparation on."""
    names = [name for name, _ in log]
    first = names.index("hold")
    start = max(i for i in range(first) if names[i] == "prepare")
    return log[start:]


def test_each_run_is_prepared_then_the_cache_is_flushed_and_the_stream_is_held(gpu):
    log, found = gpu(run_s=0.02, prepare_s=0.3, seconds=0.0)
    assert found == stopwatch.Timing(1000.0, 0.0, stopwatch.LEAST)
    names = [name for name, _ in timed(log)]
    once = ["prepare", "zero_", "sum", "hold", "record", "run", "record"]
    assert names == once * stopwatch.LEAST + ["wait"]


def test_the_cache_is_left_with_lines_that_were_only_read(gpu):
    log, _ = gpu(run_s=0.02, prepare_s=0.0, seconds=0.0)
    flushes = [entry for entry in timed(log) if isinstance(entry[1], torch.Tensor)]
    assert len(flushes) == 2 * stopwatch.LEAST
    for (write, written), (read, other) in zip(flushes[::2], flushes[1::2], strict=True):
        assert write.endswith("_") and not read.endswith("_")
        assert written.data_ptr() != other.data_ptr()
        assert written.nbytes >= 2 * CACHE and other.nbytes >= 2 * CACHE


@pytest.mark.parametrize("run_s", [0.0, 0.02])
def test_the_stream_is_held_until_the_host_has_launched_the_run_alone(gpu, run_s):
    log, _ = gpu(run_s, prepare_s=0.3, seconds=0.0)
    holds = [cycles for name, cycles in log if name == "hold"]
    assert len(holds) == stopwatch.LEAST and len(set(holds)) == 1
    fastest = 2.95e9  # cycles a second of the fastest GPUs there are
    assert holds[0] > 0 and run_s < holds[0] / fastest < 0.1


@pytest.mark.parametrize("run_s, runs", [(0.001, 1 + 25), (0.004, 1 + 7), (20.0, 1 + 3)])
def test_it_is_warmed_up_by_time_and_three_times_at_least(gpu, run_s, runs):
    log, _ = gpu(run_s, prepare_s=0.0, seconds=0.0)
    names = [name for name, _ in log]
    before = names[: names.index("hold")].count("run")
    assert before == pytest.approx(runs, abs=1)  # a clock of floats may need a run more


def test_there_are_as_many_runs_as_fit(gpu):
    assert gpu(run_s=0.01, prepare_s=0.01, seconds=0.2)[1].runs == pytest.approx(10, abs=1)


def test_there_are_not_too_many_runs(gpu):
    assert gpu(run_s=1e-5, prepare_s=0.0, seconds=1.0)[1].runs == stopwatch.MOST
