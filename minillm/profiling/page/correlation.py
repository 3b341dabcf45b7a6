"""Rank correlation between the static bounds of tiles and their measured speeds.

    rho = the correlation of the ranks of bounds and of measured speeds; 1 if the orders agree

Source: Spearman 1904, "The Proof and Measurement of Association between Two Things"; equal values
share the mean of their ranks. The bound is that of the audit (see bound.py), read from the code
that was launched.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import StatisticsError, correlation, fmean
from subprocess import CalledProcessError
from typing import Any

from minillm.profiling.page.pivot import Row, number, text

TITLE = "Rank correlation of static bound and measured speed"
LEAST = 4  # fewest tiles whose order means anything
Launch = tuple[str, Any, dict]  # name, compiled kernel, arguments by name


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """List what Triton compiles and launches inside the `with`, but not what it interprets."""
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
    """Return {"bound_tflops": ...} or {"bound_gbps": ...} of the launch that took a tile.

    It is {} if there is no such launch, or its code cannot be read.

    launched: the launches, see `launches`
    kernel: name of the tile's table; of several launches with this tile, the one with the most
        similar name counts
    options: the tile
    arch: 80, 90 or 100
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
    except (OSError, RuntimeError, CalledProcessError):  # no disassembler, or it fails
        return {}
    limit = bound(ARCHS[arch], loop, ttir.hot(asm["ttir"]), ttir.hot(asm["ttgir"]), warps, streams)
    if streams:
        return {"bound_gbps": round(limit.gbps, 1)}
    return {"bound_tflops": round(limit.tflops_max, 2)}


def correlations(rows: Iterable[Row]) -> list[Row]:
    """Return op, kernel, size, tiles and rho for each entry of the suite `tune`, then their mean.

    It is [] if no row has both a bound and a time. tiles counts those that have both. rho is None
    if they are fewer than LEAST, or all equal in bound or speed.
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
    """Return the rank correlation; None of fewer than LEAST pairs, or if one side is constant."""
    if len(pairs) < LEAST:
        return None
    try:
        return correlation(*(_places(side) for side in zip(*pairs, strict=True)))
    except StatisticsError:
        return None


def _places(values: Sequence[float]) -> list[float]:
    """Return the rank of each value; equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]
