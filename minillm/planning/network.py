"""How long collectives take: rings over links of a latency and a bandwidth, and the fit of both.

What this room does not do: send anything. benchmarks/zero/fit.py measures; plan.py asks.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minillm.errors import UsageError

# How often the ring is gone round: an all-reduce is a reduce-scatter and then an all-gather.
ROUNDS = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}


@dataclass(frozen=True)
class Link:
    """A rank's way to the next. alpha_s: of each message.    bytes_per_s: in one direction."""

    alpha_s: float
    bytes_per_s: float

    def ring_s(self, n_bytes: float, ranks: int) -> float:
        """Once round a ring: alpha (W - 1) + n (W - 1) / (W beta), seconds.

        n_bytes: of the whole, of which each rank begins or ends with a share.
        Source: Thakur et al. 2005, "Optimization of collective communication operations in MPICH",
        section 4.
        """
        return (self.alpha_s + n_bytes / (ranks * self.bytes_per_s)) * (ranks - 1)


@dataclass(frozen=True)
class Network:
    """What connects `ranks` ranks.

    levels: for each collective (how many, by which link) from the inside outwards: a rank's share
    of one level goes on to the next.    source: where the figures come from, in words.
    measured: whether they are of this machine and this number of ranks.
    """

    ranks: int
    levels: dict[str, tuple[tuple[int, Link], ...]]
    source: str
    measured: bool = False

    def seconds(self, collective: str, n_bytes: float) -> float:
        """One collective of `n_bytes`: what goes into a reduction, or comes out of a gathering."""
        total, left = 0.0, float(n_bytes)
        for size, link in self.levels[collective]:
            total += link.ring_s(left, size)
            left /= size
        return ROUNDS[collective] * total


def alone() -> Network:
    """One rank, which sends nothing."""
    return Network(1, dict.fromkeys(ROUNDS, ()), "one rank", measured=True)


def nodes(ranks: int, node_gpus: int, inside: Link, between: Link, source: str) -> Network:
    """Nodes of `node_gpus` ranks; between nodes each rank of one has a link to the next's.

    Raises UsageError if the last node would not be full.
    """
    if ranks > node_gpus and ranks % node_gpus:
        raise UsageError(
            f"--gpus {ranks} does not fill nodes of --node-gpus {node_gpus}; take a multiple of "
            f"{node_gpus}, or another --node-gpus"
        )
    levels = ((min(ranks, node_gpus), inside), (max(1, ranks // node_gpus), between))
    return Network(ranks, dict.fromkeys(ROUNDS, levels), source)


def read(path: Path, ranks: int) -> Network:
    """The network that benchmarks/zero/fit.py found for so many ranks.

    Raises UsageError if the file is none of its, or has not that number.
    """
    if ranks == 1:
        return alone()
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise UsageError(f"--links {path}: {what}; expected what benchmarks/zero/fit.py writes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        worlds, machine = content["worlds"], str(content["machine"])
        if str(ranks) not in worlds:
            counts = ", ".join(sorted(worlds, key=int)) or "none"
            raise UsageError(
                f"--links {path}: {ranks} ranks were not measured (there: {counts}); give "
                "--link-gbs to extrapolate"
            )
        found = worlds[str(ranks)]
        levels = {name: ((ranks, _link(found[name])),) for name in ROUNDS}
        source = f"fitted {found['date']} on {machine}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"--links {path}: not what benchmarks/zero/fit.py writes") from None
    return Network(ranks, levels, source, measured=True)


def _link(entry: dict) -> Link:
    alpha_s, rate = float(entry["alpha_s"]), float(entry["beta_bytes_per_s"])
    if not (math.isfinite(alpha_s) and alpha_s >= 0 and rate > 0):
        raise ValueError("a latency or a bandwidth that is none")
    return Link(alpha_s, rate)


def fit(collective: str, ranks: int, times: Sequence[tuple[int, float]]) -> Link:
    """The link whose ring comes closest to measured times, by least squares of relative errors.

    times: (bytes, seconds) of at least two sizes. Neither figure becomes negative.
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
    """Mean relative error of the link's times against measured ones."""
    predicted = (ROUNDS[collective] * link.ring_s(n, ranks) for n, _ in times)
    return sum(abs(p - s) / s for p, (_, s) in zip(predicted, times, strict=True)) / len(times)
