"""Suite `kernels`: time and error of each implementation, one row for each problem and direction.

A row has these keys. A value that is not known is None, and then the note has the reason. An
implementation with wrong results is not timed.
    suite, op, shape, dtype, direction, implementation
    median_us, spread_us
    tflops, gbps: by useful FLOPs and bytes
    percent_of_ceiling, ceiling ("compute" or "memory", whichever takes longer)
    peak_bytes: memory beyond the inputs, on a GPU
    error: relative error against fp64
    interpreted_error: the same of a small problem in Triton's interpreter
    note
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillm.profiling.catalogue.entry import BACKWARD, BOTH, Data
from minillm.profiling.catalogue.problem import Problem, small_problem
from minillm.profiling.page.pivot import WRONG
from minillm.profiling.timing import interpreted, precision, roofline
from minillm.profiling.timing.implementations import (
    Absent,
    error_in_words,
    implementations,
    triton_table,
)
from minillm.runtime.stopwatch import Timing, Trial, on_cpu, on_gpu

Row = dict[str, Any]
MOST = 0.5  # largest relative error; above it results are wrong in any dtype


@dataclass(frozen=True)
class Effort:
    """Time for each measurement.

    seconds: time for the runs of one row
    compiled: whether torch.compile is tried
    """

    seconds: float = 0.2
    compiled: bool = True


def run(
    problems: Sequence[Problem],
    device: torch.device,
    roofs: dict[str, float],
    effort: Effort,
    say: Callable[[str], None],
    save: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Return the rows of all problems.

    problems: problems to measure
    device: device to measure on
    roofs: measured ceilings of the device, see ceilings.ceilings
    effort: time for each row
    say: called with each line of progress
    save: called with all rows so far after each problem
    """
    rows: list[Row] = []
    triton = triton_table(device)
    for n, problem in enumerate(problems, 1):
        say(f"{n}/{len(problems)} {problem.op} {problem.shape} {problem.dtype}")
        rows += _solve(problem, device, roofs, effort, triton)
        save(rows)
        release(device)
    if device.type == "cpu":
        say(f"{len({p.op for p in problems})} kernels in the interpreter, for their errors")
        _interpret(rows, problems)
    return rows


def release(device: torch.device) -> None:
    """Empty the GPU's cache of memory; a GPU that has failed may refuse."""
    if device.type == "cuda":
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def wrong(error: float | None) -> bool:
    """Return whether an error means that results are wrong; False if it is not known."""
    return error is not None and not error <= MOST


def _solve(problem, device, roofs, effort, triton) -> list[Row]:
    """Return the rows of one problem, for each direction those of all implementations."""
    try:
        data = problem.data(device)
        true = precision.truth(problem, data)
    except Exception as e:
        note = f"the data or its truth: {error_in_words(e)}"
        return [_row(problem, d, "eager", roofs, note=note) for d in problem.directions]
    able: dict[str, Callable] = {}
    found: dict[tuple[str, str], Row] = {}
    names = implementations(problem, device, effort.compiled, triton)
    for name, function in names.items():
        errors, note = {}, function if isinstance(function, Absent) else ""
        if not note:
            try:
                errors = precision.errors(function, data, true)
                able[name] = function
            except Exception as e:  # missing in this version, out of memory: the row has the reason
                note = error_in_words(e)
        for d in problem.directions:
            error = errors.get(d)
            why = WRONG if wrong(error) else note
            found[d, name] = _row(problem, d, name, roofs, error=error, note=why)
    del true
    for direction in problem.directions:
        right = {n: f for n, f in able.items() if not wrong(found[direction, n]["error"])}
        trials = {name: trial_of(f, data, direction) for name, f in right.items()}
        for name, result in _timed(trials, device, effort.seconds).items():
            timing, peak, note = result
            row = found[direction, name]
            error = row["error"]
            found[direction, name] = _row(
                problem, direction, name, roofs, timing, peak, error, note
            )
    return [found[d, name] for d in problem.directions for name in names]


def trial_of(function: Callable, data: Data, direction: str) -> Trial:
    """Return a trial of one direction. Before a backward pass alone the forward pass is not timed.

    function: implementation of the operation
    data: its arguments
    direction: "forward", "backward" or both, as in entry.py
    """
    train = direction != "forward" or "targets" not in data.others
    leaves = {n: x.detach().requires_grad_(train) for n, x in data.leaves.items()}
    wanted = list(leaves.values())

    def forward(_: Any = None) -> list[Tensor]:
        y = function(**leaves, **data.others)
        return [y] if isinstance(y, Tensor) else list(y or ())

    if direction not in (BACKWARD, BOTH):
        return Trial(forward)

    def backward(y: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, wanted, data.dy)

    if direction == BACKWARD:
        return Trial(backward, forward)
    return Trial(lambda _: backward(forward()))


def _timed(
    trials: dict[str, Trial], device: torch.device, seconds: float
) -> dict[str, tuple[Timing | None, int | None, str]]:
    """Return for each trial its timing, its peak of memory and, if it failed, the reason."""
    if device.type == "cpu":
        # They run in turn, so a trial that fails must not take part.
        failed = {name: why for name, trial in trials.items() if (why := _failure(trial))}
        well = [name for name in trials if name not in failed]
        timings = on_cpu([trials[name] for name in well], seconds) if well else []
        done = {name: (t, None, "") for name, t in zip(well, timings, strict=True)}
        return {**done, **{name: (None, None, why) for name, why in failed.items()}}
    found: dict[str, tuple[Timing | None, int | None, str]] = {}
    for name, trial in trials.items():
        try:
            trial.once()
            peak = peak_bytes(trial, device)
            found[name] = on_gpu(trial, seconds, device), peak, ""
        except Exception as e:
            found[name] = None, None, error_in_words(e)
    return found


def _failure(trial: Trial) -> str:
    try:
        trial.once()
    except Exception as e:
        return error_in_words(e)
    return ""


def peak_bytes(trial: Trial, device: torch.device) -> int:
    """Return the most bytes that a trial holds beyond those that were allocated before it.

    trial: the trial, which runs once
    device: a CUDA device
    """
    given = trial.prepare()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    trial.run(given)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _row(
    problem: Problem,
    direction: str,
    implementation: str,
    roofs: dict[str, float],
    timing: Timing | None = None,
    peak: int | None = None,
    error: float | None = None,
    note: str = "",
) -> Row:
    flops, moved = problem.cost(direction)
    compute_s = flops / (roofs[f"{problem.dtype}_tflops"] * 1e12)
    memory_s = moved / (roofline.bandwidth(roofs, moved)[0] * 1e9)
    seconds = timing.median_us / 1e6 if timing else None
    return {
        "suite": "kernels",
        "op": problem.op,
        "shape": problem.shape,
        "dtype": problem.dtype,
        "direction": direction,
        "implementation": implementation,
        "median_us": timing.median_us if timing else None,
        "spread_us": timing.spread_us if timing else None,
        "tflops": flops / seconds / 1e12 if seconds else None,
        "gbps": moved / seconds / 1e9 if seconds else None,
        "percent_of_ceiling": 100 * max(compute_s, memory_s) / seconds if seconds else None,
        "ceiling": "compute" if compute_s > memory_s else "memory",
        "peak_bytes": peak,
        "error": error,
        "interpreted_error": None,
        "note": note,
    }


def _interpret(rows: list[Row], problems: Sequence[Problem]) -> None:
    """Write into the rows of our kernels their errors in the interpreter, at a small size."""
    which = {p.op: small_problem(p.op, p.dtype) for p in problems}
    for small, answer in zip(which.values(), interpreted.errors(list(which.values())), strict=True):
        for row in rows:
            if row["op"] != small.op or row["implementation"] != "triton":
                continue
            error = row["interpreted_error"] = answer["errors"].get(row["direction"])
            row["note"] = answer["note"]
            if error is not None:
                row["note"] = f"{WRONG}; " * wrong(error) + (
                    "needs a GPU to be timed; in Triton's interpreter, "
                    f"at {small.shape}, its error is {error:.1e}"
                )
