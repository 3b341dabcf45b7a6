"""Two RMSNorms in a row after the addition of a branch, for the halves of a sandwich block.

As in rms_norm.py, statistics are fp32, and gradients of weights are summed over the rows of a
program and then over programs, without atomics. The backward pass does not read the result of the
first norm but computes it a second time from the sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels._entrance import differentiable, entrance, last, wants_gradient
from minillm.kernels._launch import launch, tile
from minillm.kernels._rows import check_rows, columns_together, load_row, load_tile, share, store


@triton.jit(do_not_specialize=["N"])
def _sandwich_norm_fwd_kernel(
    x_ptr, residual_ptr, w_post_ptr, w_pre_ptr, y_ptr, h_ptr, s_ptr, rstd_ptr,
    x_stride, residual_stride, N, C, eps,
    SAVE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    columns = tl.arange(0, BLOCK_C)[None, :]
    mask = (rows < N) & (columns < C)
    to = rows * C + columns
    x = load_tile(x_ptr, rows, x_stride, columns, mask)
    x += load_tile(residual_ptr, rows, residual_stride, columns, mask)
    s = x.to(y_ptr.dtype.element_ty)
    x = s.to(tl.float32)
    rstd_post = 1 / tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True) / C + eps)
    if SAVE:  # now, so that s need not stay in registers
        tl.store(s_ptr + to, s, mask=mask)
        tl.store(rstd_ptr + rows, rstd_post, mask=rows < N)
    h = (x * rstd_post * load_row(w_post_ptr, columns, columns < C)).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + to, h, mask=mask)
    x = h.to(tl.float32)
    rstd_pre = 1 / tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True) / C + eps)
    store(y_ptr + to, x * rstd_pre * load_row(w_pre_ptr, columns, columns < C), mask)
    if SAVE:
        tl.store(rstd_ptr + N + rows, rstd_pre, mask=rows < N)


@triton.jit(do_not_specialize=["N", "blocks"])
def _sandwich_norm_bwd_kernel(
    s_ptr, w_post_ptr, w_pre_ptr, rstd_ptr, dy_ptr, dh_ptr, ds_ptr, dw_ptr, dy_stride, dh_stride,
    N, C, blocks,
    ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    dw_ptr += program * 2 * C  # a row for w_post, then one for w_pre
    columns = tl.arange(0, BLOCK_C)[None, :]
    w_post = load_row(w_post_ptr, columns, columns < C)
    w_pre = load_row(w_pre_ptr, columns, columns < C)
    dw_post = tl.zeros([1, BLOCK_C], tl.float32)
    dw_pre = tl.zeros([1, BLOCK_C], tl.float32)
    for i in tl.range(0, blocks, num_stages=STAGES):
        rows = (program * blocks + i) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        rstd_post = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
        rstd_pre = tl.load(rstd_ptr + N + rows, mask=rows < N, other=0.0)
        mask = (rows < N) & (columns < C)
        s = load_tile(s_ptr, rows, C, columns, mask) * rstd_post
        dy = load_tile(dy_ptr, rows, dy_stride, columns, mask)
        h = (s * w_post).to(s_ptr.dtype.element_ty).to(tl.float32) * rstd_pre
        dw_pre += tl.sum(dy * h, 0, keep_dims=True)
        dy *= w_pre
        dh = (dy - h * (tl.sum(dy * h, 1, keep_dims=True) / C)) * rstd_pre
        if ADD:
            dh += load_tile(dh_ptr, rows, dh_stride, columns, mask)
        dw_post += tl.sum(dh * s, 0, keep_dims=True)
        dh *= w_post
        ds = (dh - s * (tl.sum(dh * s, 1, keep_dims=True) / C)) * rstd_post
        store(ds_ptr + rows * C + columns, ds, mask)
    tl.store(dw_ptr + columns, dw_post, mask=columns < C)
    tl.store(dw_ptr + C + columns, dw_pre, mask=columns < C)


@triton.jit(do_not_specialize=["N", "blocks"])
def _sandwich_norm_wide_bwd_kernel(
    s_ptr, w_post_ptr, w_pre_ptr, rstd_ptr, dy_ptr, dh_ptr, ds_ptr, dw_ptr, dy_stride, dh_stride,
    N, C, blocks,
    ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Handle rows too wide for registers: three passes over the columns, two from a cache.

    The partial sums of both dw stay in memory.
    """
    program = tl.program_id(0).to(tl.int64)
    dw_ptr += program * 2 * C
    for i in range(blocks):
        rows = (program * blocks + i) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        rstd_post = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
        rstd_pre = tl.load(rstd_ptr + N + rows, mask=rows < N, other=0.0)
        mean_pre = tl.zeros([BLOCK_N, 1], tl.float32)
        mean_post = tl.zeros([BLOCK_N, 1], tl.float32)
        for PASS in tl.static_range(3):  # the second norm's mean, the first's, the gradients
            products = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
            for start in tl.range(0, C, BLOCK_C, num_stages=STAGES):
                columns = start + tl.arange(0, BLOCK_C)[None, :]
                mask = (rows < N) & (columns < C)
                w_post = load_row(w_post_ptr, columns, columns < C)
                w_pre = load_row(w_pre_ptr, columns, columns < C)
                s = load_tile(s_ptr, rows, C, columns, mask) * rstd_post
                dy = load_tile(dy_ptr, rows, dy_stride, columns, mask)
                h = (s * w_post).to(s_ptr.dtype.element_ty).to(tl.float32) * rstd_pre
                if PASS == 0:
                    products += dy * w_pre * h
                else:
                    dh = (dy * w_pre - h * mean_pre) * rstd_pre
                    if ADD:
                        dh += load_tile(dh_ptr, rows, dh_stride, columns, mask)
                    if PASS == 1:
                        products += dh * w_post * s
                    else:
                        dw_post = load_row(dw_ptr, columns, (columns < C) & (i > 0))
                        dw_post += tl.sum(dh * s, 0, keep_dims=True)
                        tl.store(dw_ptr + columns, dw_post, mask=columns < C)
                        dw_pre = load_row(dw_ptr + C, columns, (columns < C) & (i > 0))
                        dw_pre += tl.sum(dy * h, 0, keep_dims=True)
                        tl.store(dw_ptr + C + columns, dw_pre, mask=columns < C)
                        ds = (dh * w_post - s * mean_post) * rstd_post
                        store(ds_ptr + rows * C + columns, ds, mask)
            if PASS == 0:
                mean_pre = tl.sum(products, 1, keep_dims=True) / C
            elif PASS == 1:
                mean_post = tl.sum(products, 1, keep_dims=True) / C
        tl.debug_barrier()  # the threads that read dw may not be those that wrote it


@torch.library.custom_op("minillm::sandwich_norm", mutates_args=())
def _sandwich_norm(
    x: Tensor, residual: Tensor, w_post: Tensor, w_pre: Tensor, eps: float, train: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, h and, to train, the sum s, (N, C), and both inverse roots, (2, N); else empty."""
    N, C = x.shape
    x, residual = columns_together(x), columns_together(residual)
    y, h = (torch.empty((N, C), dtype=x.dtype, device=x.device) for _ in range(2))
    s = torch.empty((N if train else 0, C), dtype=x.dtype, device=x.device)
    rstd = torch.empty((2, s.shape[0]), dtype=torch.float32, device=x.device)
    options = tile("rms_norm", "sandwich fwd", C)
    launch(
        _sandwich_norm_fwd_kernel, (triton.cdiv(N, options["BLOCK_N"]),),
        x, residual, w_post, w_pre, y, h, s, rstd, x.stride(0), residual.stride(0), N, C, eps,
        SAVE=train, BLOCK_C=triton.next_power_of_2(C), **options,
    )  # fmt: skip
    return y, h, s, rstd


@_sandwich_norm.register_fake
def _(x, residual, w_post, w_pre, eps, train):
    N, C = x.shape
    saved = N if train else 0
    s, rstd = x.new_empty(saved, C), x.new_empty(2, saved, dtype=torch.float32)
    return x.new_empty(N, C), x.new_empty(N, C), s, rstd


@torch.library.custom_op("minillm::sandwich_norm_bwd", mutates_args=())
def _sandwich_norm_bwd(
    s: Tensor, w_post: Tensor, w_pre: Tensor, rstd: Tensor, dy: Tensor, dh: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ds, dw_post, dw_pre; dh: gradient that reaches h past the second norm, or None."""
    N, C = s.shape
    dy = columns_together(dy)
    extra = dy if dh is None else columns_together(dh)
    ds = torch.empty((N, C), dtype=s.dtype, device=s.device)
    options = {"BLOCK_C": triton.next_power_of_2(C), **tile("rms_norm", "sandwich bwd", C)}
    wide = options["BLOCK_C"] < C
    programs, blocks = share(N, options["BLOCK_N"], options["num_warps"], s.device)
    dw = torch.empty((programs, 2, C), dtype=torch.float32, device=s.device)
    launch(
        _sandwich_norm_wide_bwd_kernel if wide else _sandwich_norm_bwd_kernel, (programs,),
        s, w_post, w_pre, rstd, dy, extra, ds, dw,
        dy.stride(0), extra.stride(0), N, C, blocks, ADD=dh is not None, **options,
    )  # fmt: skip
    # Two sums, because results of an operator must not share memory.
    return ds, dw[:, 0].sum(0).to(w_post.dtype), dw[:, 1].sum(0).to(w_pre.dtype)


@_sandwich_norm_bwd.register_fake
def _(s, w_post, w_pre, rstd, dy, dh):
    return s.new_empty(s.shape), w_post.new_empty(w_post.shape), w_pre.new_empty(w_pre.shape)


_gradients = last(_sandwich_norm_bwd)


def _save(ctx, inputs, output) -> None:
    _, _, w_post, w_pre, _, _ = inputs
    _, _, s, rstd = output
    ctx.save_for_backward(s, w_post, w_pre, rstd)
    ctx.mark_non_differentiable(s, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dh, *_):
    s, w_post, w_pre, rstd = ctx.saved_tensors
    dy = torch.zeros_like(s) if dy is None else dy  # only h was used
    ds, dw_post, dw_pre = _gradients(s, w_post, w_pre, rstd, dy, dh)
    return ds, ds, dw_post, dw_pre, None, None


_norms = differentiable(_sandwich_norm, _save, _backward)


@entrance(one_dtype=("x", "residual"))
def sandwich_norm(
    x: Tensor, residual: Tensor, w_post: Tensor, w_pre: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Close one half of a sandwich block and open the next, in one launch.

        h = rms_norm(x + residual, w_post) (rounded to x's dtype);   y = rms_norm(h, w_pre)

    x: the branch, (..., C), fp32, fp16 or bf16, any strides, C up to 16384
    residual: the residual stream, (..., C), in x's dtype, any strides
    w_post, w_pre: weights of the two norms, (C,), fp32, fp16 or bf16
    eps: added to both mean squares

    Returns y and h, both (..., C), in x's dtype. Gradients dx = dresidual, one tensor for both, in
    x's dtype, and dw_post and dw_pre in those of the weights, are computed in fp32; the gradient of
    h is not rounded.
    Raises ValueError if C is above 16384, or on another dtype or shape.
    Cost: forward 5 N C numbers (x, residual, s, h, y), or 4 N C without a backward pass. Backward
    4 N C (s, dy, dh, ds), or 3 N C if only the second norm uses h. Saves N C numbers (s) and 2 N
    fp32. Saving x and residual instead would move the same number of bytes and keep twice the
    memory.
    Source: Geiping et al. 2025, arXiv:2502.05171, section 3.2.
    """
    check_rows(x, {"residual": residual}, {"w_post": w_post, "w_pre": w_pre})
    w_post, w_pre = w_post.contiguous(), w_pre.contiguous()
    inputs = (x, residual, w_post, w_pre)
    train = any(map(wants_gradient, inputs))
    rows = (t.reshape(-1, t.shape[-1]) for t in (x, residual))
    y, h, _, _ = _norms(*rows, w_post, w_pre, eps, train)
    return y.view(x.shape), h.view(x.shape)
