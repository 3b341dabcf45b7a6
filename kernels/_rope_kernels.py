"""Kernels of rope.py and rope_cache.py, which normalise and rotate queries and keys.

A program takes a block of tokens and some heads of q or of k, so that it reads angles once for
several heads. While decoding, the same kernel writes keys and values into the cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels._launch import DTYPES, tile

WIDEST = 256  # head width: the largest size in the tables of tiles


@triton.jit
def _share(heads_q, heads_k, HEADS: tl.constexpr):
    """Return whether this program takes heads of q, its first head, and the number of all heads."""
    groups = tl.cdiv(heads_q, HEADS)
    group = tl.program_id(1)
    is_q = group < groups
    first = tl.where(is_q, group, group - groups) * HEADS
    return is_q, first, tl.where(is_q, heads_q, heads_k)


@triton.jit
def _load_halves(x_ptr, rows, columns, mask, HALF: tl.constexpr):
    """Return the two halves of heads, fp32, (BLOCK_N, BLOCK_D); rows: offsets, (BLOCK_N, 1)."""
    x1 = tl.load(x_ptr + rows + columns, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + rows + HALF + columns, mask=mask, other=0.0).to(tl.float32)
    return x1, x2


@triton.jit
def _store_halves(y_ptr, y1, y2, rows, columns, mask, HALF: tl.constexpr):
    dtype = y_ptr.dtype.element_ty
    tl.store(y_ptr + rows + columns, y1.to(dtype), mask=mask)
    tl.store(y_ptr + rows + HALF + columns, y2.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["N", "T", "S", "first_position"])
def _rope_fwd_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, positions_ptr,
    q_out_ptr, k_out_ptr, v_out_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, k_out_stride_b, k_out_stride_t, k_out_stride_h,
    v_out_stride_b, v_out_stride_t, v_out_stride_h, angle_stride_b, angle_stride_t,
    first_position, N, T, S, H, G, eps,
    HALF: tl.constexpr, NORM: tl.constexpr, CACHE: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    is_q, first, heads = _share(H, G, HEADS)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    b = n // T
    t = n % T
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = (n < N) & (columns < HALF)
    at = t
    if CACHE:
        at += first_position
        if RAGGED:
            at += tl.load(positions_ptr + b, mask=n < N, other=0)
        mask = mask & (at >= 0) & (at < S)  # a wrong position must not write elsewhere
    angles = b * angle_stride_b + at * angle_stride_t + columns
    cos = tl.load(cos_ptr + angles, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angles, mask=mask, other=0.0).to(tl.float32)
    x_ptr, weight_ptr, stride = k_ptr, k_weight_ptr, k_stride_h
    rows = b * k_stride_b + t * k_stride_t
    if is_q:
        x_ptr, weight_ptr, stride = q_ptr, q_weight_ptr, q_stride_h
        rows = b * q_stride_b + t * q_stride_t
    if NORM:
        w1 = tl.load(weight_ptr + columns, mask=columns < HALF, other=0.0).to(tl.float32)
        w2 = tl.load(weight_ptr + HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    for i in range(first, tl.minimum(first + HEADS, heads)):
        h = tl.full([], i, tl.int64)
        x1, x2 = _load_halves(x_ptr, rows + h * stride, columns, mask, HALF)
        if NORM:
            mean = tl.sum(x1 * x1 + x2 * x2, 1, keep_dims=True) / (2 * HALF)
            rstd = 1 / tl.sqrt_rn(mean + eps)
            x1 *= rstd * w1
            x2 *= rstd * w2
        y1 = x1 * cos - x2 * sin
        y2 = x2 * cos + x1 * sin
        if is_q:  # a cache may be of another dtype
            y_rows = n * H * (2 * HALF) + h * (2 * HALF)
            _store_halves(q_out_ptr, y1, y2, y_rows, columns, mask, HALF)
        else:
            y_rows = b * k_out_stride_b + at * k_out_stride_t + h * k_out_stride_h
            _store_halves(k_out_ptr, y1, y2, y_rows, columns, mask, HALF)
            if CACHE:
                v_rows = b * v_stride_b + t * v_stride_t + h * v_stride_h
                v1, v2 = _load_halves(v_ptr, v_rows, columns, mask, HALF)
                v_rows = b * v_out_stride_b + at * v_out_stride_t + h * v_out_stride_h
                _store_halves(v_out_ptr, v1, v2, v_rows, columns, mask, HALF)


@triton.jit(do_not_specialize=["N", "T"])
def _rope_bwd_kernel(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr,
    dq_ptr, dk_ptr, dw_ptr,
    dq_out_stride_b, dq_out_stride_t, dq_out_stride_h,
    dk_out_stride_b, dk_out_stride_t, dk_out_stride_h,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    angle_stride_b, angle_stride_t, N, T, H, G, eps,
    HALF: tl.constexpr, NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    is_q, first, heads = _share(H, G, HEADS)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    b = n // T
    t = n % T
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = (n < N) & (columns < HALF)
    angles = b * angle_stride_b + t * angle_stride_t + columns
    cos = tl.load(cos_ptr + angles, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angles, mask=mask, other=0.0).to(tl.float32)
    dy_ptr, x_ptr, weight_ptr, dx_ptr = dk_out_ptr, k_ptr, k_weight_ptr, dk_ptr
    dy_rows = b * dk_out_stride_b + t * dk_out_stride_t
    rows = b * k_stride_b + t * k_stride_t
    dy_stride, stride = dk_out_stride_h, k_stride_h
    if is_q:
        dy_ptr, x_ptr, weight_ptr, dx_ptr = dq_out_ptr, q_ptr, q_weight_ptr, dq_ptr
        dy_rows = b * dq_out_stride_b + t * dq_out_stride_t
        rows = b * q_stride_b + t * q_stride_t
        dy_stride, stride = dq_out_stride_h, q_stride_h
    if NORM:
        w1 = tl.load(weight_ptr + columns, mask=columns < HALF, other=0.0).to(tl.float32)
        w2 = tl.load(weight_ptr + HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)
        dw1 = tl.zeros([1, BLOCK_D], tl.float32)
        dw2 = tl.zeros([1, BLOCK_D], tl.float32)
    for i in range(first, tl.minimum(first + HEADS, heads)):
        h = tl.full([], i, tl.int64)
        dy1, dy2 = _load_halves(dy_ptr, dy_rows + h * dy_stride, columns, mask, HALF)
        dx1 = dy1 * cos + dy2 * sin
        dx2 = dy2 * cos - dy1 * sin
        if NORM:
            x1, x2 = _load_halves(x_ptr, rows + h * stride, columns, mask, HALF)
            mean = tl.sum(x1 * x1 + x2 * x2, 1, keep_dims=True) / (2 * HALF)
            rstd = 1 / tl.sqrt_rn(mean + eps)
            x1 *= rstd
            x2 *= rstd
            dw1 += tl.sum(dx1 * x1, 0, keep_dims=True)
            dw2 += tl.sum(dx2 * x2, 0, keep_dims=True)
            dx1 *= w1
            dx2 *= w2
            mean = tl.sum(dx1 * x1 + dx2 * x2, 1, keep_dims=True) / (2 * HALF)
            dx1 = (dx1 - x1 * mean) * rstd
            dx2 = (dx2 - x2 * mean) * rstd
        _store_halves(dx_ptr, dx1, dx2, (n * heads + h) * (2 * HALF), columns, mask, HALF)
    if NORM:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        dw_ptr += program.to(tl.int64) * (2 * HALF)
        tl.store(dw_ptr + columns, dw1, mask=columns < HALF)
        tl.store(dw_ptr + HALF + columns, dw2, mask=columns < HALF)


def grid_of(kernel: str, q: Tensor, k: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid, (blocks of tokens, groups of heads of q, then of k), and the tile.

    kernel: name of the kernel in the table of tiles
    q, k: queries, (B, T, H, D), and keys, (B, T, G, D)
    """
    options = tile("rope", kernel, q.shape[3])
    N = q.shape[0] * q.shape[1]
    groups = [triton.cdiv(x.shape[2], options["HEADS"]) for x in (q, k)]
    half = q.shape[3] // 2
    options = {**options, "HALF": half, "BLOCK_D": triton.next_power_of_2(half)}
    return (triton.cdiv(N, options["BLOCK_N"]), sum(groups)), options


def heads_together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, those whose heads are not contiguous as copies."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def contiguous(*weights: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the weights that are there, contiguous."""
    return tuple(None if w is None else w.contiguous() for w in weights)


def angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Return cos and sin, of equal strides, and their strides by row of the batch and position.

    cos, sin: tables of the angles, (P, D/2), or (B, T, D/2)
    """
    if cos.stride(-1) != 1 or sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, (cos.stride(0) if cos.dim() == 3 else 0), cos.stride(-2)


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight, k_weight) -> None:
    """Raise ValueError, naming the argument, unless the kernels can take these.

    q, k, cos, sin, q_weight, k_weight: see `rope`
    """
    if q.dim() != 4 or q.shape[3] % 2 or not 2 <= q.shape[3] <= WIDEST:
        raise ValueError(f"q: {tuple(q.shape)}, expected (B, T, H, D), D even and at most {WIDEST}")
    B, T, _, D = q.shape
    if k.dim() != 4 or (k.shape[:2], k.shape[3]) != ((B, T), D):
        raise ValueError(f"k: shape {tuple(k.shape)}, expected ({B}, {T}, G, {D})")
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    present = {name: w for name, w in weights.items() if w is not None}
    if len(present) == 1:
        raise ValueError("q_weight, k_weight: one is None, expected both or neither")
    for name, x in {"q": q, "k": k, "cos": cos, "sin": sin, **present}.items():
        if x.dtype not in DTYPES:
            raise ValueError(f"{name}: {x.dtype}, expected one of {DTYPES}")
    if k.dtype != q.dtype:
        raise ValueError(f"k: {k.dtype}, expected q's {q.dtype}")
    for name, w in present.items():
        if w.shape != (D,) or w.dtype != q_weight.dtype:
            came = f"{tuple(w.shape)} {w.dtype}"
            raise ValueError(f"{name}: {came}, expected ({D},) {q_weight.dtype}")
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        came, wanted = (f"{tuple(x.shape)} {x.dtype}" for x in (sin, cos))
        raise ValueError(f"sin: {came}, expected cos's {wanted}")
