"""What was measured on: the device, the versions, and the speeds that this device can reach."""

import datetime
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from minillm import __version__
from minillm.profiling.timing import Trial, on_cpu, on_gpu

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROOT = Path(__file__).resolve().parents[2]


def about(device: torch.device, argv: Sequence[str]) -> dict:
    """The facts without which a figure means nothing: device, versions, commit, date, command."""
    return {
        "device": name(device),
        "driver": _driver(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "minillm": __version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(("python", "-m", "minillm", "profile", *argv)),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def name(device: torch.device) -> str:
    """What the device's maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        facts = ""
    model = re.search(r"^model name\s*:\s*(.+)$", facts, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine() or "CPU"


def folder_name(device: torch.device) -> str:
    """Where results go if nobody says: the device and the date, as nvidia-h200-2026-11-21."""
    words = re.sub(r"[^a-z0-9]+", "-", name(device).lower()).strip("-")
    return f"{words}-{datetime.date.today().isoformat()}"


def ceilings(device: torch.device, dtypes: Sequence[str], quick: bool = False) -> dict[str, float]:
    """What this machine reaches as it is now: a roof for each dtype, and one for memory.

    NAME_tflops: a matrix product by PyTorch (cuBLAS) of random numbers, TFLOP/s; fp32 without tf32
    unless the caller has allowed it.    memory_gbps: a large copy, bytes read and written, GB/s.
    """
    found = {}
    n = (8192 if device.type == "cuda" else 1024) // (2 if quick else 1)
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
        seconds = _seconds(Trial(lambda _, a=a, b=b: a @ b), device, quick)
        found[f"{dtype}_tflops"] = 2 * n**3 / seconds / 1e12
    size = (1 << 30 if device.type == "cuda" else 1 << 28) >> (2 if quick else 0)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _seconds(Trial(lambda _: target.copy_(source)), device, quick)
    found["memory_gbps"] = 2 * size / seconds / 1e9
    return found


def _seconds(trial: Trial, device: torch.device, quick: bool) -> float:
    wish = 0.05 if quick else 0.3
    timing = on_gpu(trial, wish, device) if device.type == "cuda" else on_cpu([trial], wish)[0]
    return timing.median_us / 1e6


def _driver(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, encoding="utf-8", errors="replace", timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.split() or [None])[0]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of minillm's own checkout, "+" behind it if files differ; None outside of one."""
    if not (ROOT / ".git").exists():
        return None
    said = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"]):
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *words],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        said.append(done.stdout.strip())
    return said[0] + ("+" if said[1] else "") or None
