"""Helpers of kernels over whole rows: load a tile, share rows among programs, check arguments."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels._launch import DTYPES

WIDEST = 16384  # most columns: the largest size in the tables of tiles


@triton.jit
def load_tile(ptr, rows, stride, columns, mask):
    """Return a tile as (BLOCK_N, BLOCK_C), fp32, 0 outside the mask.

    ptr: pointer to the first row
    rows, columns: indices, (BLOCK_N, 1) and (1, BLOCK_C)
    stride: elements from one row to the next
    mask: (BLOCK_N, BLOCK_C), where to read
    """
    return tl.load(ptr + rows * stride + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_row(ptr, columns, mask):
    """Return the numbers of one row as (1, BLOCK_C), fp32, 0 outside the mask.

    ptr: pointer to the row
    columns: indices, (1, BLOCK_C)
    mask: (1, BLOCK_C), where to read
    """
    return tl.load(ptr + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, x, mask):
    """Store x at ptr, rounded to the dtype there.

    ptr: pointers, in the shape of x
    x: numbers to store
    mask: where to write, in the shape of x
    """
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


def share(N: int, BLOCK_N: int, num_warps: int, device: torch.device) -> tuple[int, int]:
    """Return the number of programs that share N rows in a backward pass, and the blocks of each.

    A GPU holds that number of programs at 128 registers a thread, 16 warps a multiprocessor. Each
    leaves a row of partial sums, so more programs would only leave more to add.

    N: number of rows
    BLOCK_N: rows of a block
    num_warps: warps of a program
    device: device of the launch
    """
    gpu = device.type == "cuda"
    count = torch.cuda.get_device_properties(device).multi_processor_count if gpu else 132
    programs = max(1, count * 16 // num_warps)
    blocks = max(1, triton.cdiv(N, BLOCK_N * programs))
    return triton.cdiv(N, BLOCK_N * blocks), blocks


def columns_together(x: Tensor) -> Tensor:
    """Return x if its last dimension is contiguous, else a copy in which it is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_rows(x: Tensor, like_x: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Raise ValueError, naming the argument, unless the kernel of a norm can take these.

    x: argument x, which must be (..., C) with C up to WIDEST
    like_x: tensors that must have x's shape and dtype, by the names of the arguments
    weights: tensors that must be (C,), by the names of the arguments
    """
    if x.dim() == 0 or not 1 <= x.shape[-1] <= WIDEST:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (..., C) with C from 1 to {WIDEST}")
    for name, t in {"x": x, **like_x, **weights}.items():
        if t.dtype not in DTYPES:
            raise ValueError(f"{name}: {t.dtype}, expected one of {DTYPES}")
    for name, t in like_x.items():
        if (t.shape, t.dtype) != (x.shape, x.dtype):
            came, wanted = ((tuple(u.shape), u.dtype) for u in (t, x))
            raise ValueError(f"{name}: {came}, expected x's {wanted}")
    for name, w in weights.items():
        if w.shape != x.shape[-1:]:
            raise ValueError(f"{name}: shape {tuple(w.shape)}, expected ({x.shape[-1]},)")
