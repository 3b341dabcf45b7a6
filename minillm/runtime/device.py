"""Devices, processor threads and memory of the machine that this process runs on."""

import os
import re
import statistics
import time
from pathlib import Path

import torch

from minillm.errors import UnavailableError, UsageError, parameter

# The dtypes that flags, files and reports name, by those names.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRODUCT = 512  # side of the matrices whose product is timed: 0.27 GFLOP, a millisecond or two


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device of a name.

    name: "auto" (cuda, else mps, else cpu), "cpu", "cuda", "cuda:N" or "mps"
    local_rank: number of this rank on its machine, which selects its GPU; None for one process
    Raises UnavailableError if the device does not exist, and UsageError on another name.
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
        raise UsageError(
            f"{parameter('device')} {name!r} is not one of auto, cpu, cuda, cuda:N, mps"
        ) from None
    wish = parameter("device")
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UnavailableError(f"{wish} {name}: {count} CUDA devices here; use {wish} cpu")
        return device
    if device.type == "mps" and torch.backends.mps.is_available():
        return device
    raise UnavailableError(f"{wish} {name} is not available here; use {wish} cpu")


def pick_dtype(name: str, device: torch.device, width: int) -> torch.dtype:
    """Return the dtype of the computation; "auto" is bf16 if it is faster.

    A GPU without bf16 arithmetic (older than Ampere) emulates it slowly, and "auto" is fp16 there.
    On a CPU bf16 is faster if a bf16 unit (AMX or AVX512-BF16) multiplies several times faster
    than fp32 and the model is at least 64 wide. In a narrower one conversions cost more.

    name: "auto", "fp32", "bf16" or "fp16"
    device: the device
    width: d_model of the model
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
    """Return whether this processor has AMX-bf16 or AVX512-BF16."""
    # Not public in torch; older or newer releases may not have them.
    tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in tests)


def available_threads() -> int:
    """Return the number of processors that this process may use, within a container's quota."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()  # microseconds in each period, or "max"
    if len(quota) == 2 and quota[0].isdecimal():
        count = min(count, max(1, round(int(quota[0]) / int(quota[1]))))
    return count


def set_threads(wish: str | int) -> tuple[int, str]:
    """Set the number of torch's threads; return it, and the reason in words.

    Two threads on a busy machine have been 25 to 150 times slower than one, because they wait for
    each other in a loop.

    wish: the number, or "auto", which times a matrix product with one thread and with all
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
    """Return the upper quartile of the time of one product, so that occasional stalls count."""
    a = torch.ones(PRODUCT, PRODUCT)
    times = []
    end = time.perf_counter() + 0.15
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return statistics.quantiles(times, n=4)[2]


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a plain matrix product on this machine now, of which MFU is a share.

    device: the device
    dtype: dtype of the matrices
    """
    # On a busy CPU only a short product runs without being interrupted, and only a long one keeps
    # many threads busy.
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
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def available_memory(device: torch.device) -> int | None:
    """Return the bytes of free memory, or None if the system does not report it."""
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
    """Return the text of a system file, or an empty text if there is no such file."""
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory of this process in bytes, or None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux inherits ru_maxrss from the process that started this one; VmHWM is our own.
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
