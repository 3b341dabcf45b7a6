"""Columns of the CSV files, and those that the tables of suites that are not pivoted show."""

from minillm.profiling.page.pivot import brief, number, per_cent, share, short, size, spread, text


def exact(value: object) -> str:
    """Return a number with four digits after the point, for comparing losses."""
    x = number(value)
    return "-" if x is None else f"{x:.4f}"


# The first columns of each suite's CSV, in this order; other keys follow in alphabetical order.
COLUMNS = {
    "kernels": "suite op shape dtype direction implementation median_us spread_us tflops gbps "
    "percent_of_ceiling ceiling peak_bytes error interpreted_error note",
    "model": "implementation step_ms spread_ms tokens_per_s mfu peak_bytes loss note",
    "decode": "implementation batch context tokens_per_s spread note",
    "roofline": "op shape dtype direction implementation intensity tflops attainable_tflops "
    "percent roof",
    "audit": "kernel op config arch registers spill_bytes shared_bytes tensor_core occupancy "
    "ctas_per_sm bound_tflops bound_split_tflops bound_sum_tflops bound_gbps limit num_warps "
    "num_stages serialised loads_128 loads_narrow atomics error",
    "tune": "op kernel size arch options median_us spread_us error bound_tflops bound_gbps kept "
    "note",
}

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
