"""`--tune`: measure tiles around those in kernels/tiles on this GPU, and keep the faster ones.

For each entry of the tables of this architecture, every neighbour of the present tile runs through
the public operation: a size doubled or halved, a stage more or less, a switch turned. A tile is
rejected if it fails, or if its error against fp64 is above 1.5 times that of the present tile plus
a unit of the dtype. The fastest tile is the next centre, for two rounds. It is kept if a second
measurement against the present tile confirms a gain of 2 %. All tiles tried are reported, with the
static bound of their code.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from minillm.errors import UnavailableError, UsageError, parameter
from minillm.kernels import reference
from minillm.ops import REFERENCE
from minillm.profiling.catalogue.entry import BACKWARD, FORWARD
from minillm.profiling.catalogue.problem import CATALOGUE, Problem, problem_at
from minillm.profiling.page import correlation
from minillm.profiling.page.pivot import WRONG
from minillm.profiling.timing import precision
from minillm.profiling.timing.implementations import error_in_words
from minillm.profiling.timing.operations import MOST, Row, release, trial_of
from minillm.runtime.cli import not_one_of
from minillm.runtime.device import DTYPES
from minillm.runtime.files import write_durably
from minillm.runtime.json_text import json_text
from minillm.runtime.stopwatch import on_gpu

TILES = Path(reference.__file__).parents[1] / "tiles"
GAIN = 0.98  # a tile is kept if it takes at most this share of the present time
ROUNDS = 2
SECONDS = 0.1  # time for the runs of each tile
Options = dict[str, int]


@dataclass(frozen=True)
class TileJob:
    """The problem by which one entry of a table is measured.

    extra: further arguments of the operation
    """

    problem: Problem
    direction: str
    extra: dict = field(default_factory=dict)


def job_for(table: str, kernel: str, size: int) -> TileJob | None:
    """Return the job that measures one entry of a table of tiles, or None if it is not tuned.

    table: name of the table's file
    kernel, size: the keys of the entry in it
    """
    words = set(kernel.split())
    op = "sandwich_norm" if "sandwich" in words else table
    sizes = CATALOGUE[op].tile_sizes(size, words)
    if sizes is None:
        return None
    problem = problem_at(op, sizes, "fp32" if "fp32" in words else "bf16")
    direction = BACKWARD if {"bwd", "dq", "dkdv", "delta"} & words else FORWARD
    if BACKWARD not in problem.directions:
        direction = problem.directions[-1]
    return TileJob(problem, direction, {"softcap": 30.0} if "capped" in words else {})


def neighbours(options: Options) -> list[Options]:
    """Return the tiles one change away, and those with block and warps changed together."""
    found: list[Options] = []
    for name, value in options.items():
        if isinstance(value, bool):
            changed = [not value]
        elif name in ("num_stages", "STAGES"):
            changed = [value - 1, value + 1]
        else:
            changed = [value // 2, value * 2]
        highest = 32 if name == "num_warps" else 6 if "STAGES" in name.upper() else 1 << 16
        found += [{**options, name: v} for v in changed if isinstance(v, bool) or 1 <= v <= highest]
    warps = options.get("num_warps", 0)
    for name in (n for n in options if n.startswith("BLOCK")):
        for times in (0.5, 2):
            both = {**options, name: int(options[name] * times), "num_warps": int(warps * times)}
            if both[name] >= 1 and 1 <= both["num_warps"] <= 32:
                found.append(both)
    return found


def check(operations: Sequence[str], device: torch.device) -> list[str]:
    """Return the operations to tune: those named, or all that have a table if none is named.

    operations: names of operations
    device: device to measure on

    Raises UsageError on one that has no table, and UnavailableError without a GPU.
    """
    known = sorted(path.stem for path in TILES.glob("*.json"))
    for name in operations:
        if name not in known:
            raise UsageError(f"{parameter('tune')} {not_one_of(name, known)}")
    if device.type != "cuda":
        flag = parameter("tune")
        raise UnavailableError(f"{flag}: tiles are measured on a GPU, and there is none here")
    return list(operations) or known


def run(
    operations: Sequence[str],
    device: torch.device,
    quick: bool,
    say: Callable[[str], None],
    save: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Tune the tables of some operations in place and on disk; return a row for each tile tried.

    operations: names of operations that have a table
    device: a CUDA device
    quick: run one round, and only bf16 without features
    say: called with each line of progress
    save: called with all rows so far after each entry, when its table is on disk
    """
    from minillm.kernels import _launch
    from minillm.ops import select

    table, arch, rows = select("triton", device), _launch.arch(), []
    for operation in operations:
        # Launches read this same dictionary, so a change in place takes effect at the next launch.
        tables = _launch._tables(operation)
        for kernel, arches in tables.items():
            if quick and {"fp32", "capped", "many"} & set(kernel.split()):
                continue
            entries = arches[f"sm_{arch}"]
            for size in entries:
                job = job_for(operation, kernel, int(size))
                if job is None:
                    continue
                function = partial(getattr(table, job.problem.op), **job.extra)
                bound = partial(correlation.bound_of, kernel=kernel, arch=arch)
                tuned = TunedEntry(entries, size, job, function, device, bound)
                found = list(tuned.tried(1 if quick else ROUNDS))
                where = {"op": operation, "kernel": kernel, "size": int(size), "arch": f"sm_{arch}"}
                rows += [{**where, **row, "options": _words(row["options"])} for row in found]
                say(f"{operation} {kernel} {size}: {len(found)} tiles, {tuned.verdict}")
                write_durably(TILES / f"{operation}.json", text(tables).encode())
                save(rows)
                release(device)
    return rows


class TunedEntry:
    """One entry of a table while it is tuned.

    entries, size: the table, and the key of the entry in it
    job, function: the job that measures it, and the operation
    bound: returns the static bound of launches and a tile, see correlation.bound_of
    verdict: the result, in words
    """

    def __init__(
        self, entries: dict, size: str, job: TileJob, function: Callable, device, bound: Callable
    ) -> None:
        self.entries, self.size, self.job, self.function = entries, size, job, function
        self.device, self.bound, self.verdict = device, bound, ""
        self.data = job.problem.data(device)
        extended = partial(getattr(REFERENCE, job.problem.op), **job.extra)
        self.true = precision.truth(job.problem, self.data, extended)
        self.allowed = MOST

    def tried(self, rounds: int) -> Iterator[Row]:
        """Try the tiles and yield the rows of all of them; the entry then holds the best."""
        present = dict(self.entries[self.size])
        first = self._row(present)
        if first["median_us"] is None:
            self.verdict = f"the present one stays unjudged: {first['note']}"
            yield {**first, "kept": True}
            return
        unit = torch.finfo(DTYPES[self.job.problem.dtype]).eps
        self.allowed = 1.5 * first["error"] + unit
        seen, best, rows = [present], first, [first]
        for _ in range(rounds):
            centre = best
            for options in neighbours(centre["options"]):
                if options not in seen:
                    seen.append(options)
                    rows.append(self._row(options))
                    if rows[-1]["median_us"] and rows[-1]["median_us"] < best["median_us"]:
                        best = rows[-1]
            if best is centre:
                break
        kept = first
        if best is not first:
            again = [self._row(row["options"])["median_us"] for row in (best, first)]
            if None not in again and again[0] < GAIN * again[1]:
                kept = best
        self.entries[self.size] = kept["options"]
        self.verdict = "the present one stays"
        if kept is not first:
            times = first["median_us"] / kept["median_us"]
            self.verdict = f"{_words(kept['options'])} is {times:.2f} times as fast"
        for row in rows:
            yield {**row, "kept": row is kept}

    def _row(self, options: Options) -> Row:
        """Run with one tile; return its error and its time."""
        row = dict.fromkeys(("median_us", "spread_us", "error", "bound_tflops", "bound_gbps"))
        row = {"options": options, **row, "note": ""}
        held = self.entries[self.size]
        self.entries[self.size] = options
        try:
            with correlation.launches() as launched:
                errors = precision.errors(self.function, self.data, self.true)
            row["error"] = worst(errors, self.job.problem.directions)
            if row["error"] > self.allowed:
                return {**row, "note": WRONG}
            row |= self.bound(launched, options=options)
            trial = trial_of(self.function, self.data, self.job.direction)
            timing = on_gpu(trial, SECONDS, self.device)
            return {**row, "median_us": timing.median_us, "spread_us": timing.spread_us}
        except Exception as e:  # does not compile or does not fit: rejected, with the reason
            return {**row, "note": error_in_words(e)}
        finally:
            self.entries[self.size] = held


def worst(errors: dict[str, float], directions: Sequence[str]) -> float:
    """Return the largest error; infinity if one is nan or a direction is missing.

    errors: error by direction
    directions: directions that count
    """
    found = [errors.get(direction, math.nan) for direction in directions]
    return math.inf if any(map(math.isnan, found)) else max(found)


def _words(options: Options) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def text(tables: dict) -> str:
    """Return tables of tiles as text in the form of their files, with one line for each entry."""
    kernels = []
    for kernel, arches in tables.items():
        blocks = []
        for arch, entries in arches.items():
            lines = [f'      "{size}": {json_text(row)}' for size, row in entries.items()]
            blocks.append(f'    "{arch}": {{\n' + ",\n".join(lines) + "\n    }")
        kernels.append(f'  "{kernel}": {{\n' + ",\n".join(blocks) + "\n  }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"
