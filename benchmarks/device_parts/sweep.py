"""Part `sweep`: attention with tiles around those of the table, at 4096 and 1024 tokens.

The tiles are those that `python -m minillm profile --tune` would try first. Several processes
compile them, then one measures them; nothing is written to the tables. Lines whose tile is the
table's come first.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.device_parts.session import Session
from minillm.kernels import _launch
from minillm.profiling.catalogue.problem import Problem, problem_at, small_problem
from minillm.profiling.timing import precision, tune
from minillm.profiling.timing.operations import release, trial_of, wrong

WORKERS = 12
COMPILING = 0.55  # share of the time in which tiles are compiled; the first ones are the table's
WIDTHS = (64, 128)
LENGTHS = (4096, 1024)
KERNELS = {"fwd": "forward", "dkdv": "backward", "dq": "backward"}


def run(session: Session) -> None:
    """Compile as a worker; as the process of the part, start the workers, then measure."""
    if session.worker is not None:
        for _, job in session.mine(jobs(session)):
            if not session.over:
                _compile(session, *job)
        return
    if not session.dry and not session.first:
        session.spread(min(WORKERS, os.cpu_count() or 1), COMPILING)
    for index, job in session.mine(jobs(session)):
        _measure(session, *job)
        release(session.device)
        session.begin_again_if_broken(index + 1)


def jobs(session: Session) -> list[tuple[str, int, dict]]:
    """Return kernels, head widths and tiles: first those of the table, then a neighbour of each."""
    groups = []
    for kernel in KERNELS:
        for width in WIDTHS:
            present = _launch.tile("attention", kernel, width)
            tiles = [present, *tune.neighbours(present)]
            groups.append([(kernel, width, tile) for tile in tiles])
    longest = max(map(len, groups))
    found = [group[n] for n in range(longest) for group in groups if n < len(group)]
    return found[:1] if session.dry else found


@contextmanager
def tile_in_table(kernel: str, width: int, tile: dict) -> Iterator[None]:
    """Let launches inside the `with` take a tile, by a change of the dictionary that they read.

    kernel: name of the kernel in the table of tiles
    width: head width
    tile: the tile
    """
    entries = _launch._tables("attention")[kernel][f"sm_{_launch.arch()}"]
    before, entries[str(width)] = entries[str(width)], tile
    try:
        yield
    finally:
        entries[str(width)] = before


def _problem(session: Session, width: int, length: int) -> Problem:
    if session.dry:
        return small_problem("attention", session.dtype)
    sizes = {"B": 16384 // length, "T": length, "H": 2048 // width, "D": width}
    return problem_at("attention", sizes, session.dtype)


def _compile(session: Session, kernel: str, width: int, tile: dict) -> None:
    """Run the kernel once, at a size that needs little memory; a tile may fail."""
    data = _problem(session, width, LENGTHS[-1]).data(session.device)
    try:
        with tile_in_table(kernel, width, tile):
            trial_of(session.triton.attention, data, KERNELS[kernel]).once()
            torch.cuda.synchronize(session.device)
    except Exception as e:  # the measurement meets it again, and writes a row
        print(kernel, width, _words(tile), type(e).__name__, flush=True)


def _measure(session: Session, kernel: str, width: int, tile: dict) -> None:
    """Write the row of one tile: TFLOP/s at each length, and the error at the last one."""
    where = {"kernel": kernel, "width": width, "tile": _words(tile)}
    if session.late(**where):
        return
    print(*where.values(), flush=True)
    function, direction = session.triton.attention, KERNELS[kernel]
    with session.noted(**where), tile_in_table(kernel, width, tile):
        figures: dict[str, float | str] = {}
        for length in LENGTHS:
            problem = _problem(session, width, length)
            data = problem.data(session.device)
            seconds = session.seconds(trial_of(function, data, direction))
            figures[f"tflops_{length}"] = problem.cost(direction)[0] / seconds / 1e12
        error = precision.errors(function, data, precision.truth(problem, data))[direction]
        figures["error"] = error
        figures["note"] = "rejected: wrong results" if wrong(error) else ""
        session.emit(**where, **figures)


def _words(tile: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in tile.items())
