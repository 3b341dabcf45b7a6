"""Part `environment`: versions, ceilings of the GPU, and the cost of launching a kernel."""

import os
import subprocess
import time
from collections.abc import Callable

import torch

from benchmarks.device_parts.session import Session
from minillm.profiling.timing import machine
from minillm.runtime.ceilings import ceilings

LAUNCHES = 100
CLOCKS = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,utilization.gpu,memory.used"


def run(session: Session) -> None:
    """Write the rows of this part."""
    facts = machine.about(session.device, ())
    for name in ("device", "driver", "minillm", "python", "torch", "triton", "commit"):
        session.emit(fact=name, value=facts[name])
    session.emit(fact="CPU cores", value=os.cpu_count())
    if not session.dry:
        _describe_gpu(session)
    dtypes = () if session.dry else ("bf16", "fp16", "fp32")
    with session.noted(fact="ceilings"):
        found = ceilings(session.device, dtypes, quick=session.dry)
        for name, value in found.items():
            session.emit(fact=name, value=value)
    with session.noted(check="addmm with fp32 sums"):
        _check_fp32_sums(session)
    with session.noted(launch="all"):
        _time_launches(session)


def _describe_gpu(session: Session) -> None:
    facts = torch.cuda.get_device_properties(0)
    session.emit(fact="multiprocessors", value=facts.multi_processor_count)
    session.emit(fact="compute capability", value=f"{facts.major}.{facts.minor}")
    session.emit(fact="memory, GiB", value=facts.total_memory / 2**30)
    session.emit(fact="level-2 cache, MiB", value=facts.L2_cache_size / 2**20)
    words = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    with session.noted(fact=CLOCKS):
        done = subprocess.run(
            words, capture_output=True, encoding="utf-8", errors="replace", timeout=20
        )
        session.emit(fact=CLOCKS, value=done.stdout.strip())


def _check_fp32_sums(session: Session) -> None:
    """Check that a product of bf16 matrices can be added to an fp32 matrix with a row stride.

    linear_cross_entropy sums its weight gradient in this way, chunk by chunk.
    """
    a, b = (torch.randn(256, 128, device=session.device).bfloat16() for _ in range(2))
    out = torch.zeros(256, 272, device=session.device)[:, :256]
    want = 2 * (a.double() @ b.double().t())
    for beta in (0, 1):
        if session.dry:  # a CPU has no product with another dtype of the result
            out.mul_(beta).add_(a.float() @ b.float().t())
        else:
            torch.addmm(out, a, b.t(), beta=beta, out_dtype=torch.float32, out=out)
    error = ((out.double() - want).norm() / want.norm()).item()
    verdict = "right" if error < 1e-6 else "WRONG"
    session.emit(check="addmm with fp32 sums", error=error, verdict=verdict)


def _time_launches(session: Session) -> None:
    """Measure how long the host takes to launch operations of ours, and one of PyTorch's."""
    dtype = torch.float32 if session.dry else torch.bfloat16
    x, w = torch.randn(16, 64, device=session.device, dtype=dtype), torch.ones(64)
    w = w.to(session.device)
    q, k, v = (torch.randn(1, 16, 2, 64, device=session.device, dtype=dtype) for _ in range(3))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    ops = session.triton
    calls: dict[str, Callable] = {
        "x + x, of PyTorch": lambda: x + x,
        "rms_norm": lambda: ops.rms_norm(x, w),
        "attention forward": lambda: ops.attention(q, k, v),
        "attention forward + backward": lambda: torch.autograd.grad(
            ops.attention(*leaves), leaves, q
        ),
    }
    for name, call in calls.items():
        session.emit(launch=name, host_us=1e6 * _host_seconds(call, session))


def _host_seconds(call: Callable, session: Session) -> float:
    """Return the time until the call returns; the GPU still works then."""
    runs = 2 if session.dry else LAUNCHES
    for _ in range(1 if session.dry else 5):
        call()
    if not session.dry:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(runs):
        call()
    return (time.perf_counter() - start) / runs
