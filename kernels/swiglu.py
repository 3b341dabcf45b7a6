"""Activations of the MLP in Triton: SwiGLU and GEGLU, which gate one half of a row, and relu2.

One forward and one backward kernel serve all three. Only the input is saved. The backward pass
computes the gate a second time, which costs less than reading it.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels._entrance import differentiable, entrance, last
from minillm.kernels._launch import DTYPES, launch, tile


@triton.jit
def _tile(N, F, blocks, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    """Return rows, columns and mask of this program; `blocks` programs share the same rows."""
    program = tl.program_id(0)
    rows = (program // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    columns = (program % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    return rows, columns, (rows < N) & (columns < F)


@triton.jit
def _gate(x, ACTIVATION: tl.constexpr):
    """Return silu(x) or gelu(x), and its derivative; x is fp32."""
    if ACTIVATION == "silu":
        share = 1 / (1 + tl.exp(-x))
        slope = share * (1 + x * (1 - share))
    else:
        share = 0.5 * (1 + tl.erf(x * 0.7071067811865476))  # x / sqrt 2
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1 / sqrt(2 pi)
    return x * share, slope


@triton.jit(do_not_specialize=["N"])
def _swiglu_fwd_kernel(
    x_ptr, y_ptr, x_stride, N, F, blocks,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows, columns, mask = _tile(N, F, blocks, BLOCK_N, BLOCK_F)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=mask).to(tl.float32)
    if ACTIVATION == "relu2":
        x = tl.where(x < 0, 0.0, x)
        y = x * x
    else:
        up = tl.load(x_ptr + rows * x_stride + F + columns, mask=mask).to(tl.float32)
        gate, _ = _gate(x, ACTIVATION)
        y = gate * up
    tl.store(y_ptr + rows * F + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _swiglu_bwd_kernel(
    x_ptr, dy_ptr, dx_ptr, x_stride, dy_stride, N, F, blocks,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows, columns, mask = _tile(N, F, blocks, BLOCK_N, BLOCK_F)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=mask).to(tl.float32)
    dy = tl.load(dy_ptr + rows * dy_stride + columns, mask=mask).to(tl.float32)
    if ACTIVATION == "relu2":
        dx = tl.where(x < 0, 0.0, 2 * x) * dy
        tl.store(dx_ptr + rows * F + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        up = tl.load(x_ptr + rows * x_stride + F + columns, mask=mask).to(tl.float32)
        gate, slope = _gate(x, ACTIVATION)
        dx_ptr += rows * 2 * F + columns
        tl.store(dx_ptr, (slope * up * dy).to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + F, (gate * dy).to(dx_ptr.dtype.element_ty), mask=mask)


def _grid(kernel: str, N: int, F: int) -> tuple[tuple[int], int, dict[str, int]]:
    """Return the grid, the programs in a row of tiles, and the tile, for N rows of F results."""
    options = tile("swiglu", kernel, F)
    blocks = triton.cdiv(F, options["BLOCK_F"])
    return (triton.cdiv(N, options["BLOCK_N"]) * blocks,), blocks, options


@torch.library.custom_op("minillm::swiglu", mutates_args=())
def _swiglu(x: Tensor, activation: str) -> Tensor:
    N, F = x.shape[0], _width(x, activation)
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty((N, F), dtype=x.dtype, device=x.device)
    grid, blocks, options = _grid("fwd", N, F)
    launch(
        _swiglu_fwd_kernel, grid, x, y, x.stride(0), N, F, blocks, ACTIVATION=activation, **options
    )
    return y


@_swiglu.register_fake
def _(x, activation):
    return x.new_empty(x.shape[0], _width(x, activation))


@torch.library.custom_op("minillm::swiglu_bwd", mutates_args=())
def _swiglu_bwd(x: Tensor, dy: Tensor, activation: str) -> Tensor:
    N, F = dy.shape
    x, dy = (t if t.stride(1) == 1 else t.contiguous() for t in (x, dy))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, blocks, options = _grid("bwd", N, F)
    launch(
        _swiglu_bwd_kernel, grid, x, dy, dx, x.stride(0), dy.stride(0), N, F, blocks,
        ACTIVATION=activation, **options,
    )  # fmt: skip
    return dx


@_swiglu_bwd.register_fake
def _(x, dy, activation):
    return x.new_empty(x.shape)


_gradients = last(_swiglu_bwd)


def _save(ctx, inputs, output) -> None:
    x, ctx.activation = inputs
    ctx.save_for_backward(x)


def _backward(ctx, dy):
    return _gradients(*ctx.saved_tensors, dy, ctx.activation), None


_gated = differentiable(_swiglu, _save, _backward)


def _width(x: Tensor, activation: str) -> int:
    """Return the number of results of a row of x."""
    return x.shape[-1] if activation == "relu2" else x.shape[-1] // 2


def _apply(x: Tensor, activation: str) -> Tensor:
    if x.dtype not in DTYPES:
        raise ValueError(f"x: {x.dtype}, expected one of {DTYPES}")
    if activation != "relu2" and (x.dim() == 0 or x.shape[-1] % 2):
        raise ValueError(f"x: a tensor of shape {tuple(x.shape)}, expected (..., 2F)")
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1] if x.dim() else 1)
    y = _gated(rows, activation)
    return y.view(*x.shape[:-1], y.shape[1]) if x.dim() else y.view(())


@entrance()
def swiglu(x: Tensor) -> Tensor:
    """Multiply one half of x by the SiLU of the other.

        y = silu(gate) * up,   x = [gate, up],   silu(z) = z sigmoid(z)
        dgate = silu'(gate) up dy,   dup = silu(gate) dy

    x: gate and up, as one matrix product gives both, (..., 2F), fp32, fp16 or bf16, any strides

    Returns y, (..., F), in x's dtype. The gradient, in x's dtype, is computed in fp32.
    Raises ValueError on another dtype or an odd width.
    Cost: reads x once and writes y once; saves x. Loads are 128 bits wide where F and the stride of
    the rows are multiples of 16, and narrower elsewhere.
    Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """
    return _apply(x, "silu")


@entrance()
def geglu(x: Tensor) -> Tensor:
    """Multiply one half of x by the exact GELU of the other.

        y = gelu(gate) * up,   x = [gate, up],   gelu(z) = z Phi(z)

    x: gate and up, (..., 2F), fp32, fp16 or bf16, any strides

    Returns y, (..., F), in x's dtype. Dtypes, errors and cost are those of `swiglu`.
    Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """
    return _apply(x, "gelu")


@entrance()
def relu2(x: Tensor) -> Tensor:
    """Return the squared ReLU of x, y = max(x, 0)^2; its gradient is 2 max(x, 0) dy.

    x: any shape, fp32, fp16 or bf16, any strides

    Returns y, in x's shape and dtype. The gradient, in x's dtype, is computed in fp32.
    Raises ValueError on another dtype.
    Source: So et al. 2021, arXiv:2109.08668, section 3.1.
    """
    return _apply(x, "relu2")
