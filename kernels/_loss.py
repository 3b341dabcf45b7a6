"""Backward pass of linear_cross_entropy, eager and Triton: scale the gradients made before.

The forward pass computes the gradients. The order of factors matters in fp16, which holds nothing
above 65504 and little below 6e-5. The forward pass keeps the gradients of the sum over rows in
fp32, FP16_GAIN times too large where the gradient of the logits had to be fp16. The backward pass
divides by that and by the number of rows, multiplies by the gradient of the loss (which includes
the loss scale), all in fp32, and rounds once at the end.
"""

import torch
from torch import Tensor

from minillm.kernels._entrance import last

# Gradients of logits are between -1 and 1 without a z-loss. Times 64, one of 1 / 50000, as an
# unlikely token has, is a normal number in fp16, and only one above 1000 would be infinite.
FP16_GAIN = 64.0


def gain_of(dtype: torch.dtype) -> float:
    """Return the factor by which the forward pass makes gradients too large, for x in `dtype`."""
    return FP16_GAIN if dtype == torch.float16 else 1.0


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which dx is kept for the backward pass; bf16 has the range of fp32."""
    return torch.float32 if dtype == torch.float16 else dtype


@torch.library.custom_op("minillm::linear_cross_entropy_bwd", mutates_args=())
def scaled(
    dx: Tensor, dw: Tensor, count: Tensor, dy: Tensor, x_dtype: torch.dtype, w_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return dx and dw of the mean over `count` rows, times dy, in the dtypes of x and w.

    dx: gradient of x for the sum over rows, (N, C), times gain_of(x_dtype)
    dw: the same for w, (V, C)
    count: number of rows that count, ()
    dy: gradient of the loss, ()
    x_dtype, w_dtype: dtypes of x and w
    """
    # Where no row counts, the gradients are zeros, as in the reference, and the loss is nan.
    # A factor of shape () would be rounded to the dtype of dx first; one of shape (1,) is not.
    scale = (dy / (count.clamp(min=1) * gain_of(x_dtype))).view(1)
    pairs = (dx, x_dtype), (dw, w_dtype)
    dx, dw = (torch.mul(d, scale, out=torch.empty_like(d, dtype=dtype)) for d, dtype in pairs)
    return dx, dw


@scaled.register_fake
def _(dx, dw, count, dy, x_dtype, w_dtype):
    return torch.empty_like(dx, dtype=x_dtype), torch.empty_like(dw, dtype=w_dtype)


_gradients = last(scaled)


def save(ctx, inputs, output) -> None:
    """Save for `backward`.

    ctx: context of the autograd function
    inputs: x, w, targets, softcap, z_loss, ignore_index, and whether x and w need a gradient
    output: the loss, dx, dw and the number of rows that count
    """
    x, w, *_, ctx.train_x, ctx.train_w = inputs
    ctx.dtypes = x.dtype, w.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # otherwise zeros as large as dw would be made
    ctx.save_for_backward(*output[1:])


def backward(ctx, dy, *_):
    """Return the gradients of all inputs; all are None if the loss has none.

    ctx: context that `save` filled
    dy: gradient of the loss, (), or None
    _: gradients of the other outputs, which are not differentiable
    """
    if dy is None:
        return (None,) * 8
    dx, dw = _gradients(*ctx.saved_tensors, dy, *ctx.dtypes)
    dx, dw = dx if ctx.train_x else None, dw if ctx.train_w else None
    return dx, dw, None, None, None, None, None, None
