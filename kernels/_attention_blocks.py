"""What the attention kernels share: how a block of rows is read, which pairs are seen, how scores
are capped and biased; and on the host, the tensors and numbers that all of them are launched with.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minillm.kernels._launch import has_tma, tile

ROWS = 128  # of the largest block, a multiple of every other
# Where a running maximum begins: below every score, and finite, or exp2(-inf - peak) would be NaN.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def load_block(
    x, b, h, row, x_stride_b, x_stride_t, x_stride_h, T,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows row to row + ROWS of head h, (ROWS, BLOCK_D); x is a (B, H, T, D) descriptor or pointer.

    Rows from T on are zero by descriptor and repeat the last row by pointer: finite numbers, that
    no mask is needed for, and that no query sees. Columns from D on are zero.
    """
    if TMA:
        block = x.load([b, h, row, 0]).reshape(ROWS, BLOCK_D)
    else:
        first = tl.full([], row, tl.int64) * x_stride_t
        x += b.to(tl.int64) * x_stride_b + h.to(tl.int64) * x_stride_h + first
        rows = tl.minimum(tl.arange(0, ROWS), T - 1 - row)[:, None]
        columns = tl.arange(0, BLOCK_D)[None, :]
        if D == BLOCK_D:
            block = tl.load(x + rows * x_stride_t + columns)
        else:
            block = tl.load(x + rows * x_stride_t + columns, mask=columns < D, other=0.0)
    return block


@triton.jit
def store_block(
    x_ptr, x, b, h, row, T, H, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """x (ROWS, BLOCK_D) into rows row to row + ROWS of head h of a contiguous (B, T, H, D)."""
    x_ptr += ((b.to(tl.int64) * T + row) * H + h) * D
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = row + rows < T
    if D != BLOCK_D:
        mask &= columns < D
    tl.store(x_ptr + rows * (H * D) + columns, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def first_keys(
    starts_ptr, b, row, T, window,
    ROWS: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The first key seen by each of the queries row to row + ROWS, by the first, by the last."""
    queries = row + tl.arange(0, ROWS)
    keys = tl.zeros([ROWS], tl.int32)
    lowest = 0
    highest = 0
    if DOCUMENTS:
        starts_ptr += b.to(tl.int64) * T
        keys = tl.load(starts_ptr + tl.minimum(queries, T - 1))
        lowest = tl.load(starts_ptr + row)
        highest = tl.load(starts_ptr + tl.minimum(row + ROWS, T) - 1)
    if WINDOW:
        keys = tl.maximum(keys, queries - window + 1)
        lowest = tl.maximum(lowest, row - window + 1)
        highest = tl.maximum(highest, row + ROWS - window)
    return keys, lowest, highest


@triton.jit
def hide(x, i, j, a, b, fill, BOUNDED: tl.constexpr):
    """x, or fill unless i >= j and, if BOUNDED, a >= b; i, j, a, b are rows or columns of x."""
    seen = i >= j
    if BOUNDED:
        seen = seen & (a >= b)
    return tl.where(seen, x, fill)


@triton.jit
def bias(scores, slope, queries, keys):
    """scores - slope (i - j); the positions, as fp32, are exact to 2^24."""
    return scores + slope * (keys.to(tl.float32) - queries.to(tl.float32))


@dataclass(frozen=True)
class Rule:
    """Who sees whom and how scores are made; scores s = q.k stay without the scale in a kernel.

    p_ij = exp2(factor (cap tanh(s_ij / cap) - slope / scale (i - j)) - lse_i)

    starts: (B, T) int32, where each position's document starts, or None.    window: 0 for all.
    """

    scale: float
    window: int
    softcap: float
    starts: Tensor | None
    slopes: Tensor | None

    def arguments(self) -> tuple[float, float, float, int]:
        """factor, cap, 1 / scale and window, as every kernel takes them."""
        factor = self.scale / math.log(2)
        return factor, self.softcap / self.scale, 1 / self.scale, self.window

    def switches(self, q: Tensor, k: Tensor) -> dict[str, int]:
        """The constexpr arguments that every kernel takes."""
        return {
            "SHARE": q.shape[2] // k.shape[2],
            "D": q.shape[3],
            "BLOCK_D": max(16, triton.next_power_of_2(q.shape[3])),
            "DOCUMENTS": self.starts is not None,
            "WINDOW": self.window > 0,
            "CAPPED": self.softcap > 0,
            "ALIBI": self.slopes is not None,
            "EXACT": q.dtype == torch.float32,
        }


def options(kernel: str, q: Tensor, rule: Rule) -> dict[str, int]:
    """The tile of a kernel for q's head width and dtype; a soft-cap takes registers.

    Raises ValueError on blocks that do not divide ROWS, which lse and delta are padded to.
    """
    variant = "fp32" if q.dtype == torch.float32 else "capped" if rule.softcap else ""
    if kernel == "delta":
        variant = ""
    found = tile("attention", kernel, q.shape[3], variant)
    for name in ("BLOCK_T", "BLOCK_S"):
        if ROWS % found.get(name, ROWS):
            raise ValueError(f"attention {kernel}: {name} {found[name]} does not divide {ROWS}")
    return found


def padded(T: int) -> int:
    """T, made up to whole blocks of any size."""
    return triton.cdiv(T, ROWS) * ROWS


def readable(x: Tensor) -> Tensor:
    """x (B, T, H, D), or a copy if its heads are not contiguous or its rows too far apart.

    Offsets inside a block are int32.
    """
    near = x.stride(1) * ROWS < 1 << 31
    return x if x.stride(3) == 1 and near else x.contiguous()


def tma_reads(*tensors: Tensor) -> bool:
    """Whether descriptors can and should read all of these: sm_90 or later, aligned to 16 bytes.

    Not fp32: its products are no tensor core's, and out of a descriptor's shared memory, laid out
    for one, they spill.
    """
    return has_tma() and tensors[0].dtype != torch.float32 and all(map(_is_aligned, tensors))


def _is_aligned(x: Tensor) -> bool:
    steps = [n * x.element_size() for n in _strides(x)[:3]]
    return x.data_ptr() % 16 == 0 and all(n > 0 and n % 16 == 0 for n in steps)


def _strides(x: Tensor) -> list[int]:
    """x's strides; where a dimension has size 1 and so any stride, one that a descriptor takes."""
    return [n if size > 1 else 16 for n, size in zip(x.stride(), x.shape, strict=True)]


def descriptor(x: Tensor, rows: int, BLOCK_D: int) -> TensorDescriptor:
    """x (B, T, H, D) as a (B, H, T, D) descriptor, that hands out (rows, BLOCK_D) of one head."""
    B, T, H, D = x.shape
    b, t, h, _ = _strides(x)
    return TensorDescriptor(x, [B, H, T, D], [b, h, t, 1], [1, 1, rows, BLOCK_D])
