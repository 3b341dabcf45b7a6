"""Devices, processor threads and memory of the machine that this process runs on."""

import os
import re
import statistics
import time
from pathlib import Path

import torch

from minillm.errors import UnavailableError, UsageError
from minillm.runtime.launch import World as World, launched as launched

# The dtypes that flags, files and reports name, by those names.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRODUCT = 512  # side of the matrix product that is timed: 0.27 GFLOP, a millisecond or two


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device called `name`; "auto" takes cuda, then mps, then cpu.

    local_rank: of several on this machine, each of which takes a GPU of its own.
    Raises UnavailableError if it is not there, UsageError if there is no such name.
    """
    if local_rank is not None and torch.cuda.is_available() and name in ("auto", "cuda"):
        name = f"cuda:{local_rank}"
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is not one of auto, cpu, cuda, cuda:N, mps") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UnavailableError(f"--device {name}: {count} CUDA devices here; use --device cpu")
        return device
    if device.type == "mps" and torch.backends.mps.is_available():
        return device
    raise UnavailableError(f"--device {name} is not available here; use --device cpu")


def pick_dtype(name: str, device: torch.device, width: int) -> torch.dtype:
    """The dtype of the stream; "auto" takes bf16 where it pays.

    A GPU without bf16 arithmetic (older than Ampere) only emulates it, slowly, and takes fp16. On a
    CPU that is where a bf16 unit (AMX or AVX512-BF16) multiplies several times faster than
    fp32 and the model is at least 64 wide: below, conversions eat the gain.
    """
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if native else torch.float16
        fast = device.type == "cpu" and cpu_has_bf16()
        return torch.bfloat16 if fast and width >= 64 else torch.float32
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in DTYPES, "bf16" for torch.bfloat16."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def cpu_has_bf16() -> bool:
    """Whether this processor has AMX-bf16 or AVX512-BF16."""
    # Not public in torch: an older or newer one may lack them.
    tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in tests)


def available_threads() -> int:
    """Processors this process may use, a container's quota counted."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()  # microseconds in each period, or "max"
    if len(quota) == 2 and quota[0].isdecimal():
        count = min(count, max(1, round(int(quota[0]) / int(quota[1]))))
    return count


def set_threads(wish: str | int) -> tuple[int, str]:
    """Set torch's threads to `wish`; "auto" times one matrix product with one thread and with all.

    Two threads beside a busy neighbour have been 25 to 150 times slower than one, because they
    wait for each other spinning. Returns (threads, the reason in words).
    """
    if wish != "auto":
        torch.set_num_threads(int(wish))
        return int(wish), "as asked"
    everyone = available_threads()
    if everyone == 1:
        torch.set_num_threads(1)
        return 1, "one processor"
    seconds = {}
    for threads in (1, everyone):
        torch.set_num_threads(threads)
        seconds[threads] = _product_seconds()
    best = min(seconds, key=seconds.get)
    torch.set_num_threads(best)
    times = ", ".join(f"{n}: {s * 1e3:.2f} ms" for n, s in seconds.items())
    return best, f"timed a matrix product by threads: {times}"


def _product_seconds() -> float:
    """Upper quartile of the time of one product: a stall now and then must count."""
    a = torch.ones(PRODUCT, PRODUCT)
    times = []
    end = time.perf_counter() + 0.15
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return statistics.quantiles(times, n=4)[2]


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a plain matrix product on this machine as it is now: what MFU is a share of."""
    # On a CPU with neighbours only a short product runs without being interrupted, and only a long
    # one keeps many threads busy.
    sides = (4096,) if device.type == "cuda" else (1024, 256)
    return max(_product_flops(n, device, dtype) for n in sides)


def _product_flops(n: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the speed of the fastest of many products of two n x n matrices, in FLOP/s."""
    a = torch.ones(n, n, device=device).to(dtype)
    best = float("inf")
    end = time.perf_counter() + 0.1
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def available_memory(device: torch.device) -> int | None:
    """Bytes that a training step may still take; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    if match is None:
        return None
    free = int(match[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.strip().isdecimal() and used.strip().isdecimal():
        free = min(free, int(limit) - int(used))
    return max(0, free)


def _read(path: str) -> str:
    """The text of a file of the system's, empty where there is none."""
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def peak_memory(device: torch.device) -> int | None:
    """The most bytes this process has held so far; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux hands ru_maxrss on from the process that started this one; VmHWM is our own.
    status = Path("/proc/self/status")
    own = (
        re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))
        if status.exists()
        else None
    )
    if own:
        return int(own[1]) * 1024
    try:
        import resource
        import sys
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
