"""RMSNorm in Triton, alone or after the addition of a branch: a program takes a few whole rows.

Statistics are fp32, and the inverse root is saved. The gradient of the weight is summed first over
the rows of a program and then over programs, in a fixed order without atomics, so it is equal bit
for bit from run to run. The two norms of a sandwich block are in sandwich_norm.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels._entrance import differentiable, entrance, last
from minillm.kernels._launch import launch, tile
from minillm.kernels._rows import check_rows, columns_together, load_row, load_tile, share, store


@triton.jit(do_not_specialize=["N"])
def _rms_norm_fwd_kernel(
    x_ptr, residual_ptr, w_ptr, y_ptr, s_ptr, rstd_ptr, x_stride, residual_stride, N, C, eps,
    ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    columns = tl.arange(0, BLOCK_C)[None, :]
    mask = (rows < N) & (columns < C)
    x = load_tile(x_ptr, rows, x_stride, columns, mask)
    w = load_row(w_ptr, columns, columns < C)
    if ADD:
        x += load_tile(residual_ptr, rows, residual_stride, columns, mask)
        s = x.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + rows * C + columns, s, mask=mask)
        x = s.to(tl.float32)
    rstd = 1 / tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True) / C + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)
    y = x * rstd * w
    store(y_ptr + rows * C + columns, y, mask)


@triton.jit(do_not_specialize=["N", "blocks"])
def _rms_norm_bwd_kernel(
    x_ptr, w_ptr, rstd_ptr, dy_ptr, ds_ptr, dx_ptr, dw_ptr, x_stride, dy_stride, ds_stride,
    N, C, blocks,
    ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)[None, :]
    w = load_row(w_ptr, columns, columns < C)
    dw = tl.zeros([1, BLOCK_C], tl.float32)
    for i in tl.range(0, blocks, num_stages=STAGES):
        rows = (program * blocks + i) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        mask = (rows < N) & (columns < C)
        rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
        x = load_tile(x_ptr, rows, x_stride, columns, mask) * rstd
        dy = load_tile(dy_ptr, rows, dy_stride, columns, mask)
        dw += tl.sum(dy * x, 0, keep_dims=True)
        dy *= w
        dx = (dy - x * (tl.sum(dy * x, 1, keep_dims=True) / C)) * rstd
        if ADD:
            dx += load_tile(ds_ptr, rows, ds_stride, columns, mask)
        store(dx_ptr + rows * C + columns, dx, mask)
    tl.store(dw_ptr + program * C + columns, dw, mask=columns < C)


@triton.jit(do_not_specialize=["N", "blocks"])
def _rms_norm_wide_bwd_kernel(
    x_ptr, w_ptr, rstd_ptr, dy_ptr, ds_ptr, dx_ptr, dw_ptr, x_stride, dy_stride, ds_stride,
    N, C, blocks,
    ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Handle rows too wide for registers: two passes over the columns, the second from a cache.

    The partial sums of dw stay in memory.
    """
    program = tl.program_id(0).to(tl.int64)
    dw_ptr += program * C
    for i in range(blocks):
        rows = (program * blocks + i) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
        products = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for start in tl.range(0, C, BLOCK_C, num_stages=STAGES):
            columns = start + tl.arange(0, BLOCK_C)[None, :]
            mask = (rows < N) & (columns < C)
            x = load_tile(x_ptr, rows, x_stride, columns, mask)
            dy = load_tile(dy_ptr, rows, dy_stride, columns, mask)
            products += x * dy * load_row(w_ptr, columns, columns < C)
        mean = tl.sum(products, 1, keep_dims=True) * rstd / C
        for start in tl.range(0, C, BLOCK_C, num_stages=STAGES):
            columns = start + tl.arange(0, BLOCK_C)[None, :]
            mask = (rows < N) & (columns < C)
            x = load_tile(x_ptr, rows, x_stride, columns, mask) * rstd
            dy = load_tile(dy_ptr, rows, dy_stride, columns, mask)
            dw = load_row(dw_ptr, columns, (columns < C) & (i > 0))
            dw += tl.sum(dy * x, 0, keep_dims=True)
            tl.store(dw_ptr + columns, dw, mask=columns < C)
            dx = (dy * load_row(w_ptr, columns, columns < C) - x * mean) * rstd
            if ADD:
                dx += load_tile(ds_ptr, rows, ds_stride, columns, mask)
            store(dx_ptr + rows * C + columns, dx, mask)
        tl.debug_barrier()  # the threads that read dw may not be those that wrote it


def _forward(
    x: Tensor, residual: Tensor | None, w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, s = x + residual and rstd; without a residual s is x."""
    N, C = x.shape
    x = columns_together(x)
    y = torch.empty((N, C), dtype=x.dtype, device=x.device)
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    added = x if residual is None else columns_together(residual)
    s = x if residual is None else torch.empty_like(y)
    options = tile("rms_norm", "fwd", C)
    launch(
        _rms_norm_fwd_kernel, (triton.cdiv(N, options["BLOCK_N"]),), x, added, w, y, s, rstd,
        x.stride(0), added.stride(0), N, C, eps,
        ADD=residual is not None, BLOCK_C=triton.next_power_of_2(C), **options,
    )  # fmt: skip
    return y, s, rstd


@torch.library.custom_op("minillm::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _forward(x, None, w, eps)
    return y, rstd


@_rms_norm.register_fake
def _(x, w, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("minillm::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor, residual: Tensor, w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, residual, w, eps)


@_add_rms_norm.register_fake
def _(x, residual, w, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("minillm::rms_norm_bwd", mutates_args=())
def _rms_norm_bwd(
    x: Tensor, w: Tensor, rstd: Tensor, dy: Tensor, ds: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return dx and dw; ds: gradient that reaches x past the norm, (N, C), or None."""
    N, C = x.shape
    x, dy = columns_together(x), columns_together(dy)
    extra = dy if ds is None else columns_together(ds)
    dx = torch.empty((N, C), dtype=x.dtype, device=x.device)
    options = {"BLOCK_C": triton.next_power_of_2(C), **tile("rms_norm", "bwd", C)}
    kernel = _rms_norm_wide_bwd_kernel if options["BLOCK_C"] < C else _rms_norm_bwd_kernel
    programs, blocks = share(N, options["BLOCK_N"], options["num_warps"], x.device)
    dw = torch.empty((programs, C), dtype=torch.float32, device=x.device)
    launch(
        kernel, (programs,), x, w, rstd, dy, extra, dx, dw,
        x.stride(0), dy.stride(0), extra.stride(0), N, C, blocks, ADD=ds is not None, **options,
    )  # fmt: skip
    return dx, dw.sum(0).to(w.dtype)


@_rms_norm_bwd.register_fake
def _(x, w, rstd, dy, ds):
    return x.new_empty(x.shape), w.new_empty(w.shape)


_gradients = last(_rms_norm_bwd)


def _save(ctx, inputs, output) -> None:
    x, w, _ = inputs
    _, rstd = output
    ctx.save_for_backward(x, w, rstd)
    ctx.mark_non_differentiable(rstd)


def _backward(ctx, dy, _):
    x, w, rstd = ctx.saved_tensors
    return *_gradients(x, w, rstd, dy, None), None


_norm = differentiable(_rms_norm, _save, _backward)


def _add_save(ctx, inputs, output) -> None:
    _, _, w, _ = inputs
    _, s, rstd = output
    ctx.save_for_backward(s, w, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _add_backward(ctx, dy, ds, _):
    s, w, rstd = ctx.saved_tensors
    if dy is None:  # only s was used
        return ds, ds, None, None
    dx, dw = _gradients(s, w, rstd, dy, ds)
    return dx, dx, dw, None


_add_norm = differentiable(_add_rms_norm, _add_save, _add_backward)


@entrance()
def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale each row of x to a root mean square of 1, then multiply it by w.

        y = x / sqrt(mean(x^2, -1) + eps) * w
        dx = (dy w - n mean(dy w n)) rstd,   dw = sum(dy n),   n = x rstd

    x: rows, (..., C), fp32, fp16 or bf16, any strides, C up to 16384
    w: weight, (C,), fp32, fp16 or bf16
    eps: added to the mean square

    Returns y, (..., C), in x's dtype. Gradients dx in x's dtype and dw in w's are computed in fp32.
    Raises ValueError if C is above 16384, or on another dtype or shape.
    Cost: forward 2 N C numbers (x, y), backward 3 N C (x, dy, dx). Saves x and N fp32.
    Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    check_rows(x, {}, {"w": w})
    return _norm(x.reshape(-1, x.shape[-1]), w.contiguous(), eps)[0].view(x.shape)


@entrance(one_dtype=("x", "residual"))
def add_rms_norm(
    x: Tensor, residual: Tensor, w: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum, in one launch.

        s = x + residual (rounded to x's dtype);   y = rms_norm(s, w)
        dx = dresidual = ds + (dy w - n mean(dy w n)) rstd,   dw = sum(dy n),   n = s rstd

    x: the branch, (..., C), fp32, fp16 or bf16, any strides, C up to 16384
    residual: the residual stream, (..., C), in x's dtype, any strides
    w: weight, (C,), fp32, fp16 or bf16
    eps: added to the mean square

    Returns y and s, both (..., C), in x's dtype. Gradients dx = dresidual, one tensor for both, in
    x's dtype and dw in w's are computed in fp32.
    Raises ValueError if C is above 16384, or on another dtype or shape.
    Cost: forward 4 N C numbers (x, residual, s, y), backward 4 N C (s, dy, ds, dx), or 3 N C if
    only the norm uses s. Saves s, which is an output, and N fp32.
    """
    check_rows(x, {"residual": residual}, {"w": w})
    rows = (t.reshape(-1, t.shape[-1]) for t in (x, residual))
    y, s, _ = _add_norm(*rows, w.contiguous(), eps)
    return y.view(x.shape), s.view(x.shape)
