"""Kernels with known faults, and a sound one.

Run as a script, in a process without TRITON_INTERPRET, it audits them and prints the rows as JSON;
test_audit.py reads what it prints.
"""

import json
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minillm.profiling.audit.audit import audit
from minillm.profiling.audit.cases import Case


@triton.jit
def _sound_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at))


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    x = tl.exp(x - tl.max(x, 0))  # 512 numbers a thread, needed before and after the sum
    tl.store(y_ptr + at, x / tl.sum(x, 0))


@triton.jit
def _atomic_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + at % 64, tl.load(x_ptr + at))


@triton.jit
def _narrow_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at * stride))


@triton.jit
def _large_kernel(x_ptr, y_ptr, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """X X^T with tiles as large as they are asked for; sound when they are small."""
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    y = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(x_ptr + rows[:, None] * K + k + columns[None, :])
        b = tl.load(x_ptr + rows[None, :] * K + k + columns[:, None])
        y = tl.dot(a, b, y)
    tl.store(y_ptr + rows[:, None] * BLOCK_M + rows[None, :], y)


@triton.jit
def _serialised_kernel(x_ptr, y_ptr, K, BLOCK: tl.constexpr):
    """Branch while two accumulators are in flight: with 8 warps ptxas waits for each product."""
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    y = tl.zeros([BLOCK, BLOCK], tl.float32)
    z = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        a = tl.load(x_ptr + rows * K + k + columns)
        b = tl.load(x_ptr + columns * K + k + rows)
        s = tl.dot(a, b)
        if k < 300:
            s = tl.where(rows >= columns, s, 0.0)
        y = tl.dot(s.to(tl.bfloat16), b, y)
        z = tl.dot(s.to(tl.bfloat16), a, z)
    tl.store(y_ptr + rows * BLOCK + columns, y)
    tl.store(y_ptr + BLOCK * BLOCK + rows * BLOCK + columns, z)


@triton.jit
def _plain_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """X X^T of 16-bit numbers by the fp32 units, which read them one after another."""
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    a = tl.load(x_ptr + rows * BLOCK + columns).to(tl.float32)
    y = tl.dot(a, tl.trans(a), input_precision="ieee")
    tl.store(y_ptr + rows * BLOCK + columns, y)


@triton.jit
def _rounded_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """X X^T of fp32 numbers, of which the tensor core takes 10 bits."""
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    a = tl.load(x_ptr + rows * BLOCK + columns)
    tl.store(y_ptr + rows * BLOCK + columns, tl.dot(a, tl.trans(a), input_precision="tf32"))


@triton.jit
def _wrong_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 0, "a block of negative length")


@dataclass(frozen=True)
class Bad(Case):
    """Return a case that launches one of the kernels above, by its name without _ and _kernel."""

    def run(self) -> None:
        x = torch.empty(1 << 18)
        y, half = torch.empty_like(x), x.bfloat16()
        launches = {
            "sound": lambda: _sound_kernel[(64,)](x, y, BLOCK=1024),
            "spilling": lambda: _spilling_kernel[(1,)](x, y, BLOCK=16384, num_warps=1),
            "atomic": lambda: _atomic_kernel[(64,)](x, y, BLOCK=1024),
            "narrow": lambda: _narrow_kernel[(1,)](x, y, 3, BLOCK=1024),
            "large": lambda: _large_kernel[(1,)](
                half, y, 1024, BLOCK_M=128, BLOCK_K=128, num_warps=8, num_stages=5
            ),
            "product": lambda: _large_kernel[(1,)](
                half, y, 1024, BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3
            ),
            "serialised": lambda: _serialised_kernel[(1,)](half, y, 1024, BLOCK=64, num_warps=8),
            "in flight": lambda: _serialised_kernel[(1,)](half, y, 1024, BLOCK=64, num_warps=4),
            "plain": lambda: _plain_kernel[(1,)](half, y, BLOCK=64),
            "rounded": lambda: _rounded_kernel[(1,)](x, y, BLOCK=64),
            "abort": os.abort,  # as a compiler does that asserts
            "wrong": lambda: _wrong_kernel[(1,)](x, y, BLOCK=1024),
        }
        launches[self.op]()


def main() -> None:
    """Audit all of them on sm_90, the sound ones on every architecture."""
    names = "spilling atomic narrow large serialised plain wrong unknown".split()
    cases = [Bad(90, name) for name in (*names, "in flight")] + [Bad(90, "rounded", "fp32")]
    for arch in (80, 90, 100):
        cases += [
            Bad(arch, "sound", "fp32"),
            Bad(arch, "product"),
            Case(arch, "rms_norm", "bf16", 256),
        ]
    rows = audit(cases, workers=0)
    rows += audit([Bad(90, "abort"), Bad(80, "sound")], workers=1)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
