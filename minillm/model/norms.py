"""Normalisation layers, and the table of them by name.

To add one, write its class here, give it a row in NORMS, and add its name to NORMS in
config/model.py; a test compares the two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config.model import ModelConfig
from minillm.ops import Ops


class RMSNorm(nn.Module):
    """Normalisation x / rms(x) * w; see minillm.kernels.reference.norms.rms_norm.

    width: size of the last dimension of x
    eps: number added to the mean square before the root
    ops: table of operations
    """

    def __init__(self, width: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        """Return norm(x), of the shape of x, (..., width)."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return norm(x + residual) and x + residual, computed in one pass over both.

        x, residual: tensors of one shape, (..., width)
        """
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Normalisation (x - mean) / std * w + b, where b is optional.

    width: size of the last dimension of x
    eps: number added to the variance before the root
    bias: whether b exists
    Source: Ba et al. 2016, arXiv:1607.06450, eq. 4.
    """

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return norm(x), of the shape of x, (..., width)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return norm(x + residual) and x + residual.

        x, residual: tensors of one shape, (..., width)
        """
        total = x + residual
        return self(total), total


@dataclass(frozen=True)
class NormKind:
    """Row of NORMS. Norms multiply no matrices, so no FLOPs of theirs are counted.

    build: makes the layer over the residual stream
    parameters: returns the number of its parameters, which begin as its constructor sets them
    """

    build: Callable[[ModelConfig, Ops], nn.Module]
    parameters: Callable[[ModelConfig], int]


NORMS = {
    "rmsnorm": NormKind(
        build=lambda c, ops: RMSNorm(c.d_model, c.norm_eps, ops),
        parameters=lambda c: c.d_model,
    ),
    "layernorm": NormKind(
        build=lambda c, ops: LayerNorm(c.d_model, c.norm_eps, c.bias),
        parameters=lambda c: (2 if c.bias else 1) * c.d_model,
    ),
}


def make_norm(config: ModelConfig, ops: Ops) -> nn.Module:
    """Return a new normalisation layer over the residual stream.

    config: shape of the model
    ops: table of operations
    """
    return NORMS[config.norm].build(config, ops)


def norm_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of one such layer."""
    return NORMS[config.norm].parameters(config)
