"""Suite `roofline`: how near each operation comes to what its arithmetic intensity allows.

    attainable = min(compute roof, intensity x bandwidth),   intensity = useful FLOPs / bytes

Source: Williams, Waterman & Patterson 2009, "Roofline", figure 1.
"""

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]


def rows(measured: Iterable[Row], roofs: dict[str, float]) -> list[Row]:
    """A row for each row of the suite `kernels` that has a time.    roofs: see machine.ceilings."""
    found = []
    for row in measured:
        if not row["tflops"]:
            continue
        intensity = 1e3 * row["tflops"] / row["gbps"]
        roof = min(roofs[f"{row['dtype']}_tflops"], intensity * roofs["memory_gbps"] / 1e3)
        same = {key: row[key] for key in ("op", "shape", "dtype", "direction", "implementation")}
        found.append(
            {
                **same,
                "intensity": intensity,
                "tflops": row["tflops"],
                "attainable_tflops": roof,
                "percent": 100 * row["tflops"] / roof,
            }
        )
    return found
