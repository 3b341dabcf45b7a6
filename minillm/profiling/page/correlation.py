"""Whether the static bound puts tiles in the order in which they are measured.

    rho = the correlation of two orders, of bounds and of measured speeds; 1 if they agree

Source: Spearman 1904, "The Proof and Measurement of Association between Two Things"; equal values
share the mean of their places. The bound is the audit's (see bound.py), read off the very code that
was launched.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import StatisticsError, correlation, fmean
from subprocess import CalledProcessError
from typing import Any

from minillm.profiling.page.pivot import Row, number, text

TITLE = "Rank correlation of static bound and measured speed"
LEAST = 4  # tiles, for their order to say anything
Launch = tuple[str, Any, dict]  # name, kernel as compiled, its arguments by name


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Inside the `with`, what Triton compiles and launches is listed; nothing it interprets."""
    from triton.runtime import jit

    found: list[Launch] = []
    run = jit.JITFunction.run

    def listed(self, *args, **kwargs):
        kernel = run(self, *args, **kwargs)
        found.append((self.fn.__name__, kernel, kwargs))
        return kernel

    jit.JITFunction.run = listed
    try:
        yield found
    finally:
        jit.JITFunction.run = run


def bound_of(launched: Sequence[Launch], kernel: str, options: dict, arch: int) -> dict[str, float]:
    """{"bound_tflops": ...} or {"bound_gbps": ...} of the launch that took a tile.

    {} if there is none, or its code cannot be read.
    kernel: the entry of the tile's table; of several launches with this tile it is the one that is
    most like it by name.    arch: 80, 90 or 100.
    """
    from minillm.profiling.audit import sass, ttir
    from minillm.profiling.audit.bound import bound
    from minillm.profiling.audit.cases import STREAMING
    from minillm.profiling.audit.occupancy import ARCHS

    words = set(kernel.split())
    took = [one for one in launched if options.items() <= one[2].items()]
    if not took:
        return {}
    name, built, _ = max(took, key=lambda one: len(words & set(one[0].split("_"))))
    asm, warps = built.asm, built.metadata.num_warps
    streams = not ttir.products(asm["ttir"]) or name.startswith(STREAMING)
    try:
        loop = sass.hot(sass.parse(sass.disassemble(asm["cubin"])))
    except (OSError, RuntimeError, CalledProcessError):  # no disassembler, or it refuses
        return {}
    limit = bound(ARCHS[arch], loop, ttir.hot(asm["ttir"]), ttir.hot(asm["ttgir"]), warps, streams)
    if streams:
        return {"bound_gbps": round(limit.gbps, 1)}
    return {"bound_tflops": round(limit.tflops_max, 2)}


def correlations(rows: Iterable[Row]) -> list[Row]:
    """For each entry of the suite `tune` op, kernel, size, tiles and rho; their mean below them.

    tiles: those that were timed and have a bound. rho is None if they are fewer than LEAST, or
    equal in bound or speed.    [] if no row has both.
    """
    entries: dict[tuple, list[tuple[float, float]]] = {}
    for row in rows:
        speed = number(row.get("bound_tflops")) or number(row.get("bound_gbps"))
        taken = number(row.get("median_us"))
        if speed and taken:
            where = tuple(text(row.get(key)) for key in ("op", "kernel", "size"))
            entries.setdefault(where, []).append((speed, 1 / taken))
    found: list[Row] = [
        {"op": op, "kernel": kernel, "size": size, "tiles": len(pairs), "rho": spearman(pairs)}
        for (op, kernel, size), pairs in entries.items()
    ]
    known = [row for row in found if row["rho"] is not None]
    if len(known) > 1:
        mean = {"tiles": sum(row["tiles"] for row in known), "rho": fmean(r["rho"] for r in known)}
        found.append({"op": "mean", "kernel": "", "size": "", **mean})
    return found


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """The rank correlation of LEAST pairs or more; None where all of one side are equal."""
    if len(pairs) < LEAST:
        return None
    try:
        return correlation(*(_places(side) for side in zip(*pairs, strict=True)))
    except StatisticsError:
        return None


def _places(values: Sequence[float]) -> list[float]:
    """The place of each value in their order, of equal ones the mean."""
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]
