"""Newton-Schulz in Triton: one half of each symmetric product is computed and mirrored.

Two of the three products of a step are symmetric: S = X X^T and b S + c S S. One kernel computes
both. Each of its programs computes one tile on or below the diagonal and writes it twice. The third
product is torch.baddbmm. One launch takes all matrices of a batch.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minillm.kernels._entrance import entrance
from minillm.kernels._launch import DTYPES, has_tma, launch, tile

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c


@triton.jit
def _triangle(t, n):
    """Return the tile (i, j), i >= j, that is number t of the n (n + 1) / 2 of a triangle.

    The numbers run through pairs of rows: row n - 1 - r, and the row that fills it up to n | 1.
    """
    width = n | 1
    r = t // width
    j = t % width
    if j < n - r:
        i = n - 1 - r
    else:
        i = r - n % 2
        j -= n - r
    return i, j


@triton.jit
def _load(x_ptr, rows, ks, stride_m, stride_k, M, K, EVEN_K: tl.constexpr):
    """Return x[rows, ks], zero outside of (M, K); rows and ks broadcast to a tile."""
    at = x_ptr + rows.to(tl.int64) * stride_m + ks.to(tl.int64) * stride_k
    mask = rows < M
    if not EVEN_K:
        mask = mask & (ks < K)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _tiles(
    x, batch, i, j, k, stride_b, stride_m, stride_k, M, K,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Return x[i : i + BLOCK_M, k : k + BLOCK_K] and x[j : j + BLOCK_M, k : k + BLOCK_K]^T.

    x is a descriptor of the matrices as they are in memory (TMA), or a pointer.
    """
    if TMA:
        if TRANSPOSED:
            left = x.load([batch, k, i]).reshape(BLOCK_K, BLOCK_M).T
            right = x.load([batch, k, j]).reshape(BLOCK_K, BLOCK_M)
        else:
            left = x.load([batch, i, k]).reshape(BLOCK_M, BLOCK_K)
            right = x.load([batch, j, k]).reshape(BLOCK_M, BLOCK_K).T
    else:
        # Both are loaded in the layout of the product: sm_80 does not pipeline transposed loads.
        x += batch.to(tl.int64) * stride_b
        m = tl.arange(0, BLOCK_M)
        ks = k + tl.arange(0, BLOCK_K)
        left = _load(x, i + m[:, None], ks[None, :], stride_m, stride_k, M, K, EVEN_K)
        right = _load(x, j + m[None, :], ks[:, None], stride_m, stride_k, M, K, EVEN_K)
    return left, right


@triton.jit(do_not_specialize=["tiles"])
def _symmetric_product_kernel(
    x, x_ptr, y_ptr, b, c, stride_b, stride_m, stride_k, M, K, tiles,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    TMA: tl.constexpr, TRANSPOSED: tl.constexpr, SQUARE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0) // tiles
    i, j = _triangle(tl.program_id(0) % tiles, tl.cdiv(M, BLOCK_M))
    y = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        left, right = _tiles(
            x, batch, i * BLOCK_M, j * BLOCK_M, k, stride_b, stride_m, stride_k, M, K,
            BLOCK_M, BLOCK_K, EVEN_K, TMA, TRANSPOSED,
        )  # fmt: skip
        y = tl.dot(left, right, y, input_precision=PRECISION)
    rows = (i * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = (j * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    mask = (rows < M) & (columns < M)
    if SQUARE:
        at = x_ptr + batch.to(tl.int64) * stride_b + rows.to(tl.int64) * stride_m + columns
        y = b * tl.load(at, mask=mask, other=0.0).to(tl.float32) + c * y
    y = y.to(y_ptr.dtype.element_ty)
    y_ptr += batch.to(tl.int64) * M * M
    tl.store(y_ptr + rows.to(tl.int64) * M + columns, y, mask=mask)
    if i != j:
        tl.store(y_ptr + columns.to(tl.int64) * M + rows, y, mask=mask)


def _symmetric_product(x: Tensor, b: float, c: float, square: bool) -> Tensor:
    """Return x x^T, or if `square` b x + c x x^T of a symmetric x; x: (batch, M, K)."""
    if x.dtype not in DTYPES:
        raise ValueError(f"x: {x.dtype}, expected one of {DTYPES}")
    if x.stride(2) != 1 and x.stride(1) != 1:
        x = x.contiguous()
    batch, M, K = x.shape
    y = torch.empty((batch, M, M), dtype=x.dtype, device=x.device)
    variant = "fp32" if x.dtype == torch.float32 else ""
    options = tile("newton_schulz", "symmetric_product", M, variant)
    BLOCK_M, BLOCK_K = options["BLOCK_M"], options["BLOCK_K"]
    transposed = x.stride(2) != 1
    stored, shape = (x.mT, (BLOCK_K, BLOCK_M)) if transposed else (x, (BLOCK_M, BLOCK_K))
    tma = has_tma() and x.numel() > 0 and x.data_ptr() % 16 == 0 and stored.stride(2) == 1
    tma = tma and all(s > 0 and s * x.element_size() % 16 == 0 for s in stored.stride()[:2])
    n = triton.cdiv(M, BLOCK_M)
    tiles = n * (n + 1) // 2
    launch(
        _symmetric_product_kernel, (batch * tiles,),
        TensorDescriptor.from_tensor(stored, [1, *shape]) if tma else x, x, y, b, c,
        *x.stride(), M, K, tiles, EVEN_K=K % BLOCK_K == 0, TMA=tma, TRANSPOSED=transposed,
        SQUARE=square, PRECISION="ieee" if variant else None, **options,
    )  # fmt: skip
    return y


@torch.library.custom_op("minillm::xxt", mutates_args=())
def xxt(x: Tensor) -> Tensor:
    """Return S = X X^T, (batch, M, M), in x's dtype.

    x: matrices, (batch, M, K), fp32, fp16 or bf16, any strides
    """
    return _symmetric_product(x, 0.0, 1.0, square=False)


@torch.library.custom_op("minillm::symmetric_square", mutates_args=())
def symmetric_square(s: Tensor, b: float, c: float) -> Tensor:
    """Return P = b S + c S S, (batch, M, M), in s's dtype.

    s: symmetric matrices, (batch, M, M), fp32, fp16 or bf16
    b, c: coefficients of the formula
    """
    return _symmetric_product(s.contiguous(), b, c, square=True)


@xxt.register_fake
def _(x):
    return x.new_empty((x.shape[0], x.shape[1], x.shape[1]))


@symmetric_square.register_fake
def _(s, b, c):
    return s.new_empty(s.shape)


@entrance()
@torch.no_grad()
def newton_schulz(g: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Push the singular values of each matrix towards 1 (about 0.7 to 1.2 after five steps).

        X <- G / (|G|_F + 1e-7), then in each step S = X X^T;  P = b S + c S S;  X <- a X + P X

    g: matrices, (..., M, N), fp32, fp16 or bf16, any strides
    steps: number of iterations
    dtype: dtype of the products and the result, fp32, fp16 or bf16 (None: g's); the norm, and
        the division by it, are fp32

    Returns X, (..., M, N), in that dtype, contiguous. Every product is summed in fp32 and rounded
    to that dtype. There is no gradient.
    For tall matrices X^T X is multiplied on the right, which gives the same numbers without a
    transposed copy.
    Raises ValueError if g or dtype is fp64, or if g has fewer than two dimensions.
    Cost: 2 M M N + 2 M M M + 2 M M N FLOPs a step (M <= N), of which the first two are halved.
    Source: Jordan et al. 2024, "Muon", coefficients (3.4445, -4.7750, 2.0315).
    """
    if g.dim() < 2 or g.dtype not in DTYPES:
        raise ValueError(f"g: {tuple(g.shape)} {g.dtype}, expected (..., M, N), one of {DTYPES}")
    dtype = dtype or g.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype}, expected one of {DTYPES}")
    a, b, c = COEFFICIENTS
    x = g.reshape(math.prod(g.shape[:-2]), *g.shape[-2:])
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = torch.div(x, norm + 1e-7, out=g.new_empty(x.shape, dtype=dtype))
    tall = x.shape[1] > x.shape[2]
    for _ in range(steps):
        p = symmetric_square(xxt(x.mT if tall else x), b, c)
        x = torch.baddbmm(x, x, p, beta=a) if tall else torch.baddbmm(x, p, x, beta=a)
    return x.view(g.shape)
