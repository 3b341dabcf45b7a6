"""Implementations of an operation: PyTorch eager and compiled, the vendor's kernels, and Triton's.

eager       the table EAGER, which the model calls without Triton
compile     torch.compile of it, or of plain PyTorch where eager code avoids the compiler
flash, cudnn, efficient    the back ends of scaled_dot_product_attention, by name
vendor      PyTorch's kernels called directly, where eager code does something else: the fused
            AdamW, and a matrix product with a cross-entropy
triton      our kernels
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minillm.errors import UnavailableError
from minillm.ops import EAGER, REFERENCE, Ops, select
from minillm.profiling.catalogue.problem import Problem
from minillm.runtime.program import one_line

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
NEEDS_GPU = "needs a GPU"
UNKNOWN_TO_SDPA = {"W": "window", "docs": "documents", "cap": "soft-cap"}

Absent = str  # the reason why there is no implementation


def implementations(
    problem: Problem, device: torch.device, compiled: bool, triton: Ops | Absent
) -> dict[str, Callable | Absent]:
    """Return each implementation of the problem's operation, or the reason why there is none.

    problem: operation, sizes and dtype
    device: device of the data
    compiled: try torch.compile
    triton: our table, or why there is none
    """
    op, on_gpu = problem.op, device.type == "cuda"
    found: dict[str, Callable | Absent] = {"eager": getattr(EAGER, op)}
    # Code compiled for one shape must not be used for the next, nor count against a limit.
    torch.compiler.reset()
    plain = COMPILED.get(op, getattr(EAGER, op))
    found["compile"] = torch.compile(plain, dynamic=False) if compiled else "not with --quick"
    if op in ("attention", "decode_attention"):
        lacking = [words for size, words in UNKNOWN_TO_SDPA.items() if size in problem.sizes]
        causal = op == "attention"
        for name, backend in BACKENDS.items():
            if lacking:
                found[name] = f"scaled_dot_product_attention has no {' and no '.join(lacking)}"
            elif on_gpu or name == "flash":
                found[name] = partial(_attention, backend=backend, causal=causal)
            else:
                found[name] = NEEDS_GPU
    elif op == "adamw":
        found["vendor"] = FusedAdamW()
    elif op in VENDOR:
        found["vendor"] = VENDOR[op]
    found["triton"] = triton if isinstance(triton, Absent) else getattr(triton, op)
    return found


def triton_table(device: torch.device) -> Ops | Absent:
    """Return the table of Triton's kernels, or why there is none."""
    if device.type != "cuda":
        return NEEDS_GPU
    try:
        return select("triton", device)
    except (UnavailableError, ImportError) as e:
        return error_in_words(e)


def error_in_words(error: BaseException) -> str:
    """Return an exception in a few words: its class and its first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if first.endswith("raised:") and len(lines) > 1:  # torch.compile has the cause in the next line
        first = lines[1]
    return one_line(f"{type(error).__name__}: {first}" if first else type(error).__name__, 160)


def _attention(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend, causal: bool) -> Tensor:
    heads = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=grouped)
    return y.transpose(1, 2)


def _cross_entropy(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w).float(), targets)


class FusedAdamW:
    """PyTorch's fused AdamW kernel, and nothing else in repeated calls with the same gradients.

    The first call makes what the kernel also needs: counters of steps, and gradients in fp32.
    """

    def __init__(self) -> None:
        self.given: list[Tensor] | None = None
        self.grads: list[Tensor] = []
        self.steps: list[Tensor] = []

    def __call__(self, params, grads, exp_avgs, exp_avg_sqs, step, *, lr, weight_decay) -> None:
        """Take one step of AdamW, see REFERENCE.adamw, with one rate and one decay."""
        if self.given is not grads:
            self.given = grads
            self.grads = [g.to(p.dtype) for g, p in zip(grads, params, strict=True)]
            self.steps = [torch.full((), float(step), device=p.device) for p in params]
        torch._fused_adamw_(
            params, self.grads, exp_avgs, exp_avg_sqs, [], self.steps, amsgrad=False, beta1=0.9,
            beta2=0.95, lr=lr[0], weight_decay=weight_decay[0], eps=1e-8, maximize=False,
        )  # fmt: skip


VENDOR: dict[str, Callable] = {"linear_cross_entropy": _cross_entropy}  # and FusedAdamW
COMPILED: dict[str, Callable] = {
    "linear_cross_entropy": _cross_entropy,
    "adamw": REFERENCE.adamw,
}
