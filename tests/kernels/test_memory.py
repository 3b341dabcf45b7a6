"""On a GPU: no kernel reads or writes beyond its tensors, at odd sizes, says compute-sanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EVERY_KERNEL = """
import torch
from minillm.ops import select
torch.manual_seed(0)
D = torch.device("cuda")
ops = select("triton", D)

def leaf(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device=D, dtype=dtype, requires_grad=True)

def run(y):
    sum(t.float().sum() for t in (y if isinstance(y, tuple) else (y,))).backward()

B, T, H, G, C, F, V = 2, 131, 6, 2, 100, 77, 333
documents = torch.randint(0, 9, (B, T), device=D).sort(1).values
slopes = torch.rand(H, device=D)
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for d in (32, 64, 96, 128):
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
            where = torch.tensor([70, 9], device=D)
            new = [x[:, :3].detach() for x in (q, k, v)]
            tables = torch.rand(2, 203, d // 2, device=D)
            ops.rope_cache(*new, *tables, cache[0], cache[1], where)
            ops.decode_attention(new[0], cache[0][:, :73], cache[1][:, :73], where + 3, window=50)
    x, r, w, w2 = leaf(3, 7, C, dtype=dtype), leaf(3, 7, C, dtype=dtype), leaf(C), leaf(C)
    run(ops.rms_norm(x, w))
    run(ops.add_rms_norm(x, r, w))
    run(ops.sandwich_norm(x, r, w, w2))
    for op in (ops.swiglu, ops.geglu, ops.relu2):
        run(op(leaf(3, 7, 2 * F, dtype=dtype)))
    targets = torch.randint(0, V, (65,), device=D)
    run(ops.linear_cross_entropy(leaf(65, C, dtype=dtype), leaf(V, C, dtype=torch.float32), targets))
    ops.newton_schulz(torch.randn(3, 70, 45, device=D, dtype=dtype))
    ops.sample(torch.randn(3, V, device=D, dtype=dtype), torch.rand(3, device=D), top_k=9, top_p=0.9, min_p=0.1)
many = [[torch.rand(n, device=D) for n in (1, 5, 1029, 70001)] for _ in range(4)]
ops.adamw(*many, 1, lr=[0.1] * 4, weight_decay=[0.1] * 4)
ops.uniform(3, torch.arange(5, device=D), torch.arange(5, device=D))
torch.cuda.synchronize()
"""  # noqa: E501


@pytest.mark.gpu
def test_no_access_out_of_bounds():
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        pytest.skip("compute-sanitizer is not installed")
    paths = os.pathsep.join(sys.path)
    # Without PyTorch's cache each tensor is an allocation of its own, whose end is known.
    alone = {**os.environ, "PYTHONPATH": paths, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
    result = subprocess.run(
        [*command, "-c", EVERY_KERNEL], env=alone, capture_output=True, text=True
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
