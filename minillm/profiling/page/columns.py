"""Columns that tables show, for the suites that are not pivoted."""

from minillm.profiling.page.pivot import brief, number, per_cent, share, short, size, spread, text


def exact(value: object) -> str:
    """Return a number with four digits after the point, for comparing losses."""
    x = number(value)
    return "-" if x is None else f"{x:.4f}"


# {suite: {key: (title, writer)}}
SHOWN = {
    "model": {
        "implementation": ("implementation", text),
        "step_ms": ("step ms", short),
        "spread_ms": ("spread ms", spread),
        "tokens_per_s": ("tokens/s", short),
        "mfu": ("MFU %", share),
        "peak_bytes": ("peak memory", size),
        "loss": ("loss", exact),
    },
    "roofline": {
        "op": ("op", text),
        "shape": ("shape", text),
        "dtype": ("dtype", text),
        "direction": ("pass", brief),
        "implementation": ("implementation", text),
        "intensity": ("FLOP/byte", short),
        "tflops": ("TFLOP/s", short),
        "attainable_tflops": ("attainable", short),
        "roof": ("roof", text),
        "percent": ("%", per_cent),
    },
    "tune": {
        "op": ("op", text),
        "kernel": ("kernel", text),
        "size": ("size", text),
        "options": ("tile", text),
        "median_us": ("median us", short),
        "bound_tflops": ("bound TFLOP/s", short),
        "bound_gbps": ("bound GB/s", short),
        "kept": ("kept", lambda kept: "kept" if kept else ""),
    },
    "audit": {
        "kernel": ("kernel", text),
        "config": ("config", text),
        "arch": ("arch", text),
        "registers": ("registers", text),
        "spill_bytes": ("spill B", text),
        "shared_bytes": ("shared", size),
        "occupancy": ("occupancy %", share),
        "bound_tflops": ("bound TFLOP/s", short),
        "bound_gbps": ("bound GB/s", short),
        "limit": ("limit", text),
        "tensor_core": ("tensor core", text),
    },
}
