"""Linear maps whose weights may have a wider dtype than the residual stream.

Shapes: `in` and `out` are the widths of a map's input and output.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Matrix:
    """Description of a weight matrix: its shape, how it begins and how optimizers treat it.

    Counts of parameters and FLOPs, initial weights, Muon and plans are derived from it.

    rows: row counts of the independent maps stacked in the matrix (queries, keys and values, for
        example), which Muon orthogonalises separately
    columns: number of columns
    residual: True if the output of the map is added to the residual stream; initial weights of
        such maps are smaller, or zero
    identity: True if the matrix begins as the identity and is exempt from weight decay
    """

    rows: tuple[int, ...]
    columns: int
    residual: bool = False
    identity: bool = False

    @property
    def elements(self) -> int:
        """Return the number of parameters."""
        return sum(self.rows) * self.columns


class Linear(nn.Linear):
    """Linear map y = x W^T + b, computed in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        """Return y, (..., out), for x, (..., in)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Head(Linear):
    """Output layer without a bias, whose logits are at least fp32 for every dtype of x.

    Rounded to bf16, a logit of 10 would be off by up to 0.03, and its probability by 3 %.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (..., out), for x, (..., in)."""
        w = self.weight
        narrow = x.dtype == w.dtype and w.dtype in (torch.float16, torch.bfloat16)
        if narrow and x.is_cuda and not torch.is_grad_enabled():  # without a copy of w in fp32
            z = torch.mm(x.flatten(0, -2), w.t(), out_dtype=torch.float32)
            return z.unflatten(0, x.shape[:-1])
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))
