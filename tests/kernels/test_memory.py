"""No kernel reads or writes beyond its tensors, at odd sizes, says compute-sanitizer on a GPU.

Without one the same calls are interpreted, so that they are known to run, and to run every kernel.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EVERY_KERNEL = """
import sys
import torch
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction
from minillm.kernels import _launch

plain, launched = _launch.launch, set()

def launch(kernel, *args, **options):
    launched.add(kernel.fn.__name__)
    plain(kernel, *args, **options)

_launch.launch = launch  # before the rooms take it from there

from minillm.kernels import linear_cross_entropy
from minillm.ops import select

torch.manual_seed(0)
D = torch.device("cuda" if torch.cuda.is_available() else "cpu")
few = D.type == "cpu"
ops = select("triton", D)
linear_cross_entropy.CHUNK = 333 * 20

def leaf(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device=D, dtype=dtype, requires_grad=True)

def run(y):
    sum(t.float().sum() for t in (y if isinstance(y, tuple) else (y,))).backward()

B, T, H, G, C, F, V = 2, 131, 6, 2, 100, 77, 333
if few:
    B, T, H, G = 1, 35, 2, 1
documents = torch.randint(0, 9, (B, T), device=D).sort(1).values
slopes = torch.rand(H, device=D)
where = torch.tensor([70, 9], device=D)[:B]
for dtype in (torch.bfloat16,) if few else (torch.bfloat16, torch.float16, torch.float32):
    for d in (20,) if few else (20, 32, 64, 96, 128):  # rows of 20 are no descriptor's
        heads = leaf(B, T, H + 2 * G, d, dtype=dtype)
        q, k, v = heads.split((H, G, G), 2)
        cos, sin = torch.rand(2, T, d // 2, device=D)
        norms = leaf(d, dtype=torch.float32), leaf(d, dtype=torch.float32)
        q, k = ops.rope(q, k, cos, sin, *norms)
        packed, biased = {"window": 37, "documents": documents}, {"softcap": 3.0, "alibi_slopes": slopes}
        for options in ({}, packed, biased):
            y = ops.attention(q, k, v, **options)
            torch.autograd.grad(y.float().sum(), heads, retain_graph=True)
        with torch.no_grad():
            cache = torch.zeros(2, B, 203, G, d, device=D, dtype=dtype)
            new = [x[:, :3].detach() for x in (q, k, v)]
            tables = torch.rand(2, 203, d // 2, device=D)
            ops.rope_cache(*new, *tables, cache[0], cache[1], where)
            ops.decode_attention(new[0], cache[0][:, :73], cache[1][:, :73], where + 3, window=50)
            ops.decode_attention(new[0], cache[0], cache[1], where + 3)
    for C in (100, 16384):  # a row at once, and in parts
        x, r, w, w2 = leaf(3, 7, C, dtype=dtype), leaf(3, 7, C, dtype=dtype), leaf(C), leaf(C)
        run(ops.rms_norm(x, w))
        run(ops.add_rms_norm(x, r, w))
        run(ops.sandwich_norm(x, r, w, w2))
    for op in (ops.swiglu, ops.geglu, ops.relu2):
        run(op(leaf(3, 7, 2 * F, dtype=dtype)))
    targets = torch.randint(0, V, (65,), device=D)
    run(ops.linear_cross_entropy(leaf(65, 100, dtype=dtype), leaf(V, 100, dtype=torch.float32), targets))
    ops.newton_schulz(torch.randn(3, 70, 45, device=D, dtype=dtype))
    ops.sample(torch.randn(3, V, device=D, dtype=dtype), torch.rand(3, device=D), top_k=9, top_p=0.9, min_p=0.1)
for first in (0, 1):  # aligned to 16 bytes, and not
    many = [[torch.rand(n + 1, device=D)[first:] for n in (1, 5, 1029, 7001)] for _ in range(4)]
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in many[0]]
    rates = {"lr": [0.1] * 4, "weight_decay": [0.1] * 4}
    ops.adamw(*many, 1, **rates)
    ops.adamw(*many, 2, **rates, grad_scale=torch.ones((), device=D), copies=copies)
ops.uniform(3, torch.arange(5, device=D), torch.arange(5, device=D))
if D.type == "cuda":
    torch.cuda.synchronize()
rooms = [vars(m) for name, m in list(sys.modules.items()) if name.startswith("minillm.kernels.")]
kinds = JITFunction, InterpretedFunction
kernels = {n for room in rooms for n, x in room.items() if n.endswith("_kernel") and isinstance(x, kinds)}
assert len(kernels) > 15 and launched == kernels, kernels ^ launched
"""  # noqa: E501


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the sanitizer watches it")
def test_every_kernel_is_called():
    pytest.importorskip("triton")
    env = environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", EVERY_KERNEL]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.gpu
def test_no_access_out_of_bounds():
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        pytest.skip("compute-sanitizer is not installed")
    # Without PyTorch's cache each tensor is an allocation of its own, whose end is known.
    alone = environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
    result = subprocess.run(
        [*command, "-c", EVERY_KERNEL], env=alone, capture_output=True, text=True
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
