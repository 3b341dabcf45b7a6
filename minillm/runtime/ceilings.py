"""Measure the highest speeds of this machine: matrix products in each dtype, and memory."""

import math
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minillm.runtime.device import DTYPES
from minillm.runtime.stopwatch import LEAST, Trial, on_gpu


def name(device: torch.device) -> str:
    """Return the maker's name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        facts = ""
    model = re.search(r"^model name\s*:\s*(.+)$", facts, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine() or "CPU"


# Bytes of the working sets for which a CPU's bandwidth is measured besides that of its memory: from
# the size of the level-1 or level-2 caches of a few cores to that of a large level-3 cache.
WORKING_SETS = tuple(1 << n for n in (16, 18, 20, 22, 24, 26))


def ceilings(device: torch.device, dtypes: Sequence[str], quick: bool = False) -> dict[str, Any]:
    """Return the highest speeds that this machine reaches now, for each dtype and for memory.

    device: the device
    dtypes: names of the dtypes, "fp32", "fp16" or "bf16"
    quick: True to take less time, with less accuracy
    Returns a dict with these keys:
    NAME_tflops: matrix product of random numbers by PyTorch (cuBLAS), in TFLOP/s; fp32 without tf32
        unless the caller has allowed it. On a CPU the fastest of several sizes, and at least that
        of fp32, as an operation may widen its data and compute in fp32.
    memory_gbps: large copy, bytes read and written, in GB/s; on a CPU also a sum and a product
    cached_gbps: on a CPU, unless there are no dtypes, the same at WORKING_SETS bytes: {bytes: GB/s}
    """
    found: dict[str, Any] = {}
    n = (8192 if device.type == "cuda" else 1024) // (2 if quick else 1)
    # On a busy CPU only a short product runs without being interrupted.
    widths = (n,) if device.type == "cuda" else (n, 256, 128)
    for dtype in dtypes:
        found[f"{dtype}_tflops"] = max(_product_tflops(w, dtype, device, quick) for w in widths)
    size = (1 << 30 if device.type == "cuda" else 1 << 28) >> (2 if quick else 0)
    if device.type == "cuda":
        source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds = _seconds(Trial(lambda _: target.copy_(source)), device, quick)
        return {**found, "memory_gbps": 2 * size / seconds / 1e9}
    for name in found:
        found[name] = max(found[name], found.get("fp32_tflops", 0.0))
    found["memory_gbps"] = _streaming_gbps(2 * size, device, quick)
    if dtypes:
        found["cached_gbps"] = {
            str(n): _streaming_gbps(n, device, quick) for n in WORKING_SETS
        }  # text, as keys of JSON are
    return found


def _product_tflops(n: int, dtype: str, device: torch.device, quick: bool) -> float:
    """Return the speed of a product of two random matrices of n x n, in TFLOP/s."""
    a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
    return 2 * n**3 / _seconds(Trial(lambda _: a @ b), device, quick) / 1e12


def _streaming_gbps(n_bytes: int, device: torch.device, quick: bool) -> float:
    """Return the speed of the fastest of three ways to stream over `n_bytes`, in GB/s.

    Copying writes as much as it reads, a product of two tensors a third as much, a sum nothing;
    which of them is fastest depends on the processor.
    """
    numbers = torch.rand(n_bytes // 4, device=device)
    half, third = n_bytes // 8, n_bytes // 12
    a, b = numbers[:half], numbers[half : 2 * half]
    x, y, z = (numbers[i * third : (i + 1) * third] for i in range(3))
    ways = {
        "copy": (8 * half, lambda _: a.copy_(b)),
        "product": (12 * third, lambda _: torch.mul(x, y, out=z)),
        "sum": (4 * len(numbers), lambda _: numbers.sum()),
    }
    return max(moved / _seconds(Trial(run), device, quick) / 1e9 for moved, run in ways.values())


def _seconds(trial: Trial, device: torch.device, quick: bool) -> float:
    """Return the time of a trial in seconds: on a GPU the median, on a CPU the shortest.

    A CPU may be shared, and its highest speed is that without other load.
    """
    wish = 0.05 if quick else 0.3
    if device.type == "cuda":
        return on_gpu(trial, wish, device).median_us / 1e6
    trial.once()
    least, runs, end = math.inf, 0, time.perf_counter() + wish
    while runs < LEAST or time.perf_counter() < end:
        start = time.perf_counter()
        trial.once()
        least, runs = min(least, time.perf_counter() - start), runs + 1
    return least
