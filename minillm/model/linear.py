"""Linear maps: weights in one dtype, the stream in another."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T + b in x's dtype, whatever the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in).    Returns (..., out)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Head(Linear):
    """The output layer without a bias: logits in at least fp32, whatever x's dtype is.

    Rounded to bf16, a logit of 10 would be off by up to 0.03, and its probability by 3 %.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in).    Returns (..., out)."""
        w = self.weight
        narrow = x.dtype == w.dtype and w.dtype in (torch.float16, torch.bfloat16)
        if narrow and x.is_cuda and not torch.is_grad_enabled():  # without a copy of w in fp32
            z = torch.mm(x.flatten(0, -2), w.t(), out_dtype=torch.float32)
            return z.unflatten(0, x.shape[:-1])
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))
