"""Suite `roofline`: speed of each operation against the limit by its arithmetic intensity.

    attainable = min(compute roof, intensity x bandwidth),   intensity = useful FLOPs / bytes

The bandwidth is that of the level of memory that holds the data of the operation, because on a CPU
they stay in a cache from one run to the next.
Sources: Williams, Waterman & Patterson 2009, "Roofline", figure 1; for roofs of caches Ilic, Pratas
& Sousa 2014, "Cache-aware Roofline model: Upgrading the loft".
"""

from collections.abc import Iterable, Mapping
from typing import Any

from minillm.profiling.page.pivot import size

Row = dict[str, Any]


def bandwidth(roofs: Mapping[str, Any], n_bytes: float) -> tuple[float, str]:
    """Return the bandwidth for a working set of `n_bytes`, in GB/s, and the name of the roof.

    It is that of the largest measured size up to `n_bytes`, or of a larger size that was faster, so
    that the roof is rather too high than too low.

    roofs: see ceilings.ceilings. Without "cached_gbps" there is one bandwidth, that of the memory
    n_bytes: bytes of the working set
    """
    levels = {int(n): gbps for n, gbps in (roofs.get("cached_gbps") or {}).items()}
    if not levels or n_bytes > 4 * max(levels):
        return roofs["memory_gbps"], "memory"
    least = max((n for n in levels if n <= n_bytes), default=min(levels))
    fastest = max(gbps for n, gbps in levels.items() if n >= least)
    return max(fastest, roofs["memory_gbps"]), f"data of {size(least)}"


def rows(measured: Iterable[Row], roofs: Mapping[str, Any]) -> list[Row]:
    """Return a row for each row of the suite `kernels` that has a time.

    measured: rows of the suite `kernels`
    roofs: see ceilings.ceilings
    """
    found = []
    for row in measured:
        if not row["tflops"]:
            continue
        intensity = 1e3 * row["tflops"] / row["gbps"]
        gbps, level = bandwidth(roofs, 1e3 * row["gbps"] * row["median_us"])
        compute, memory = roofs[f"{row['dtype']}_tflops"], intensity * gbps / 1e3
        roof = min(compute, memory)
        same = {key: row[key] for key in ("op", "shape", "dtype", "direction", "implementation")}
        found.append(
            {
                **same,
                "intensity": intensity,
                "tflops": row["tflops"],
                "attainable_tflops": roof,
                "percent": 100 * row["tflops"] / roof,
                "roof": "compute" if compute < memory else level,
            }
        )
    return found
