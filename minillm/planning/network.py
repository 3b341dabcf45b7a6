"""Estimate the time of collectives from the latency and bandwidth of links, and fit these two.

The collectives are rings. Nothing is sent here: benchmarks/zero/fit.py measures, and estimate.py
uses the estimates.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minillm.errors import UsageError, parameter

# Rounds of the ring: an all-reduce is a reduce-scatter followed by an all-gather.
ROUNDS = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}


@dataclass(frozen=True)
class Link:
    """Link from a rank to the next.

    alpha_s: latency of each message, seconds
    bytes_per_s: bandwidth in one direction
    """

    alpha_s: float
    bytes_per_s: float

    def ring_s(self, n_bytes: float, ranks: int) -> float:
        """Return seconds of one round of a ring: alpha (W - 1) + n (W - 1) / (W beta).

        n_bytes: bytes n of the whole tensor, of which each rank begins or ends with a share
        ranks: number of ranks W
        Source: Thakur et al. 2005, "Optimization of collective communication operations in MPICH",
        section 4.
        """
        return (self.alpha_s + n_bytes / (ranks * self.bytes_per_s)) * (ranks - 1)


@dataclass(frozen=True)
class Network:
    """Links between ranks.

    ranks: number of ranks
    levels: for each collective, (number of members, link) of each level from the inside outwards; a
        rank's share of one level is what it sends at the next
    source: origin of the figures, in words
    measured: whether they were measured on this machine with this number of ranks
    """

    ranks: int
    levels: dict[str, tuple[tuple[int, Link], ...]]
    source: str
    measured: bool = False

    def seconds(self, collective: str, n_bytes: float) -> float:
        """Return seconds of one collective.

        collective: "all_reduce", "reduce_scatter" or "all_gather"
        n_bytes: bytes that go into a reduction, or come out of an all-gather
        """
        total, left = 0.0, float(n_bytes)
        for size, link in self.levels[collective]:
            total += link.ring_s(left, size)
            left /= size
        return ROUNDS[collective] * total


def alone() -> Network:
    """Return the network of one rank, which sends nothing."""
    return Network(1, dict.fromkeys(ROUNDS, ()), "one rank", measured=True)


def nodes(ranks: int, node_gpus: int, inside: Link, between: Link, source: str) -> Network:
    """Return a network of nodes, in which each rank of a node has a link to one of the next node.

    ranks: number of ranks
    node_gpus: ranks of a node
    inside: link within a node
    between: link between nodes
    source: origin of the figures, in words
    Raises UsageError if the last node would not be full.
    """
    if ranks > node_gpus and ranks % node_gpus:
        raise UsageError(
            f"{parameter('gpus')} {ranks} does not fill nodes of {parameter('node_gpus')} "
            f"{node_gpus}; use a multiple of {node_gpus}, or another {parameter('node_gpus')}"
        )
    levels = ((min(ranks, node_gpus), inside), (max(1, ranks // node_gpus), between))
    return Network(ranks, dict.fromkeys(ROUNDS, levels), source)


def read(path: Path, ranks: int) -> Network:
    """Return the network that benchmarks/zero/fit.py measured for a number of ranks.

    path: file that it wrote
    ranks: number of ranks
    Raises UsageError if the file has another format, or lacks this number.
    """
    if ranks == 1:
        return alone()
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise UsageError(
            f"{parameter('links')} {path}: {what}; expected what benchmarks/zero/fit.py writes"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        worlds, machine = content["worlds"], str(content["machine"])
        if str(ranks) not in worlds:
            counts = ", ".join(sorted(worlds, key=int)) or "none"
            raise UsageError(
                f"{parameter('links')} {path}: {ranks} ranks were not measured (there: {counts}); "
                f"give {parameter('link_gbs')} to extrapolate"
            )
        found = worlds[str(ranks)]
        levels = {name: ((ranks, _link(found[name])),) for name in ROUNDS}
        source = f"fitted {found['date']} on {machine}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{parameter('links')} {path}: not what benchmarks/zero/fit.py writes"
        ) from None
    return Network(ranks, levels, source, measured=True)


def _link(entry: dict) -> Link:
    alpha_s, rate = float(entry["alpha_s"]), float(entry["beta_bytes_per_s"])
    if not (math.isfinite(alpha_s) and alpha_s >= 0 and rate > 0):
        raise ValueError("the latency is negative, or the bandwidth is not above 0")
    return Link(alpha_s, rate)


def fit(collective: str, ranks: int, times: Sequence[tuple[int, float]]) -> Link:
    """Return the link that fits measured times best, by least squares of relative errors.

    Neither its latency nor its bandwidth is negative.

    collective: "all_reduce", "reduce_scatter" or "all_gather"
    ranks: number of ranks
    times: (bytes, seconds) for at least two sizes
    Raises ValueError on fewer sizes or times that are not above 0.
    """
    if len({n for n, _ in times}) < 2 or min(s for _, s in times) <= 0:
        raise ValueError(f"times {times}: expected two sizes or more, each above 0 s")
    rounds = ROUNDS[collective] * (ranks - 1)
    # Columns of a linear model of 1 = alpha x + y / beta, each divided by the time itself.
    x = [rounds / s for _, s in times]
    y = [rounds * n / ranks / s for n, s in times]
    xx, xy, yy = (
        sum(a * b for a, b in zip(*pair, strict=True)) for pair in ((x, x), (x, y), (y, y))
    )
    sx, sy = sum(x), sum(y)
    determinant = xx * yy - xy * xy
    alpha_s = (sx * yy - sy * xy) / determinant
    slope = (sy * xx - sx * xy) / determinant
    if alpha_s < 0:
        alpha_s, slope = 0.0, sy / yy
    elif slope <= 0:
        alpha_s, slope = sx / xx, 0.0
    return Link(alpha_s, 1 / slope if slope else math.inf)


def error(link: Link, collective: str, ranks: int, times: Sequence[tuple[int, float]]) -> float:
    """Return the mean relative error of a link's times against measured ones.

    link: result of `fit`
    collective, ranks, times: as for `fit`
    """
    predicted = (ROUNDS[collective] * link.ring_s(n, ranks) for n, _ in times)
    return sum(abs(p - s) / s for p, (_, s) in zip(predicted, times, strict=True)) / len(times)
