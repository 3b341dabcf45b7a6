"""What both linear_cross_entropy do with the gradients that their forward pass has made.

The order matters in fp16, which holds nothing above 65504 and little below 6e-5. The forward pass
keeps the gradients of the sum over rows in fp32, FP16_GAIN times as large where the gradient of the
logits had to be fp16. The backward pass divides by that and by the number of rows, multiplies by
the gradient that comes from above (the loss scale is in it), all in fp32, and then rounds, once.
"""

import torch
from torch import Tensor

from minillm.kernels._entrance import last

# Of the gradients of the logits, which are between -1 and 1 without a z-loss: 1 / 50000, as of a
# token among many, becomes a number that fp16 holds in full; only above 1000 would be infinite.
FP16_GAIN = 64.0


def gain_of(dtype: torch.dtype) -> float:
    """How many times too large the forward pass makes its gradients for inputs of `dtype`."""
    return FP16_GAIN if dtype == torch.float16 else 1.0


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which dx waits for the backward pass; bf16 has the range of fp32."""
    return torch.float32 if dtype == torch.float16 else dtype


@torch.library.custom_op("minillm::linear_cross_entropy_bwd", mutates_args=())
def scaled(
    dx: Tensor, dw: Tensor, count: Tensor, dy: Tensor, x_dtype: torch.dtype, w_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dx and dw of the mean over `count` rows, times dy, in the dtypes of x and w."""
    # Where no row counts the gradients are zeros, as the reference's; the loss is nan.
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
    """Keep what `backward` needs; inputs: x, w, targets, softcap, z_loss, ignore_index, and
    whether x and w want a gradient.    output: the loss, dx, dw and the count of rows.
    """
    x, w, *_, ctx.train_x, ctx.train_w = inputs
    ctx.dtypes = x.dtype, w.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros as large as dw would be made
    ctx.save_for_backward(*output[1:])


def backward(ctx, dy, *_):
    """The gradients of all inputs; None where none has come from above."""
    if dy is None:
        return (None,) * 8
    dx, dw = _gradients(*ctx.saved_tensors, dy, *ctx.dtypes)
    dx, dw = dx if ctx.train_x else None, dw if ctx.train_w else None
    return dx, dw, None, None, None, None, None, None
