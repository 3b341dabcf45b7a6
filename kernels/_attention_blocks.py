"""Parts of all attention kernels: loads, masks and biases of blocks, and arguments of launches."""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minillm.kernels._launch import has_tma, tile

ROWS = 128  # rows of the largest block, a multiple of those of every other
# First value of a running maximum: below every score, and finite because exp2(-inf + inf) is nan.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def load_block(
    x, b, h, row, x_stride_b, x_stride_t, x_stride_h, T,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return rows row to row + ROWS of head h of sequence b, (ROWS, BLOCK_D).

    x: descriptor of (B, H, T, D) if TMA, else pointer to (B, T, H, D)
    b, h, row: indices of sequence, head and first row
    x_stride_b, x_stride_t, x_stride_h: strides in elements, which only a pointer needs
    T: number of rows
    ROWS, D, BLOCK_D: rows of the block, head width, and its next power of two
    TMA: whether x is a descriptor

    Rows from T on are zero by descriptor and repeat the last row by pointer. Both are finite
    numbers, so they need no mask, and no query sees them. Columns from D on are zero.
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
    """Store a block in rows row to row + ROWS of head h of sequence b.

    x_ptr: pointer to (B, T, H, D), contiguous, any float dtype
    x: the block, (ROWS, BLOCK_D), rounded to the dtype of x_ptr
    b, h, row: indices of sequence, head and first row
    T, H: number of rows and of heads
    ROWS, D, BLOCK_D: rows of the block, head width, and its next power of two
    """
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
    """Return the first key that each query of a block sees, and the lowest and highest of them.

    starts_ptr: pointer to the start of each position's document, (B, T), int32; for DOCUMENTS
    b, row: indices of sequence and first query
    T: number of positions
    window: number of keys that a query sees at most; for WINDOW
    ROWS: number of queries
    DOCUMENTS, WINDOW: whether there are documents, and a window
    """
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
    """Return x where i >= j and, if BOUNDED, a >= b; fill elsewhere.

    x: scores or probabilities of a block
    i, j: positions of its queries and keys, as a row and a column or the reverse
    a, b: more positions, likewise; for BOUNDED
    fill: number in place of what is hidden
    BOUNDED: whether a and b are compared too
    """
    seen = i >= j
    if BOUNDED:
        seen = seen & (a >= b)
    return tl.where(seen, x, fill)


@triton.jit
def bias(scores, slope, queries, keys):
    """Return scores - slope (i - j), the bias of ALiBi; positions are exact in fp32 up to 2^24.

    scores: scores of a block, fp32
    slope: slope in the unit of the scores, a number or one for each row
    queries, keys: positions i and j, as a row and a column or the reverse
    """
    return scores + slope * (keys.to(tl.float32) - queries.to(tl.float32))


@dataclass(frozen=True)
class Rule:
    """Masks and biases of one attention. In a kernel scores s = q.k stay without the scale.

        p_ij = exp2(factor (cap tanh(s_ij / cap) - slope / scale (i - j)) - lse_i)

    scale, window, softcap: see `attention`
    starts: start of the document of each position, (B, T), int32, or None
    slopes: ALiBi slope of each query head, (H,), fp32, or None
    """

    scale: float
    window: int
    softcap: float
    starts: Tensor | None
    slopes: Tensor | None

    def arguments(self) -> tuple[float, float, float, int]:
        """Return factor, cap, 1 / scale and window, as every kernel takes them."""
        factor = self.scale / math.log(2)
        return factor, self.softcap / self.scale, 1 / self.scale, self.window

    def switches(self, q: Tensor, k: Tensor) -> dict[str, int]:
        """Return the constexpr arguments that every kernel takes.

        q: queries, (B, T, H, D)
        k: keys, (B, T, G, D)
        """
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
    """Return the tile of a kernel for q's head width and dtype, smaller if there is a soft-cap.

    kernel: name of the kernel in the table of tiles
    q: queries, (B, T, H, D)
    rule: masks and biases

    Raises ValueError on blocks that do not divide ROWS, to which lse and delta are padded.
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
    """Return T, rounded up to whole blocks of any size."""
    return triton.cdiv(T, ROWS) * ROWS


def readable(x: Tensor) -> Tensor:
    """Return x, (B, T, H, D), or a copy if heads are not contiguous or rows are too far apart.

    Rows are too far apart where the offsets inside a block are not int32.
    """
    near = x.stride(1) * ROWS < 1 << 31
    return x if x.stride(3) == 1 and near else x.contiguous()


def tma_reads(*tensors: Tensor) -> bool:
    """Return whether descriptors can and should load all of these: sm_90, aligned to 16 bytes.

    They should not load fp32. Its products do not run on tensor cores, and the layout of shared
    memory that descriptors use, which is made for those, makes them spill registers.
    """
    return has_tma() and tensors[0].dtype != torch.float32 and all(map(_is_aligned, tensors))


def _is_aligned(x: Tensor) -> bool:
    steps = [n * x.element_size() for n in _strides(x)[:3]]
    return x.data_ptr() % 16 == 0 and all(n > 0 and n % 16 == 0 for n in steps)


def _strides(x: Tensor) -> list[int]:
    """Return x's strides; a dimension of size 1, which may have any, gets one that is aligned."""
    return [n if size > 1 else 16 for n, size in zip(x.stride(), x.shape, strict=True)]


def descriptor(x: Tensor, rows: int, BLOCK_D: int) -> TensorDescriptor:
    """Return a (B, H, T, D) descriptor that loads (rows, BLOCK_D) of one head.

    x: tensor, (B, T, H, D), heads contiguous
    rows, BLOCK_D: shape of the block that it loads
    """
    B, T, H, D = x.shape
    b, t, h, _ = _strides(x)
    return TensorDescriptor(x, [B, H, T, D], [b, h, t, 1], [1, 1, rows, BLOCK_D])
