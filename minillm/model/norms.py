"""Normalisation layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config.model import ModelConfig
from minillm.ops import Ops


class RMSNorm(nn.Module):
    """x / rms(x) * w, see minillm.kernels.reference.rms_norm."""

    def __init__(self, width: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width).    Returns the same shape."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x + residual) and x + residual, in one pass over them."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / std * w + b; Ba et al. 2016, arXiv:1607.06450, eq. 4. The bias is optional."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width).    Returns the same shape."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x + residual) and x + residual."""
        total = x + residual
        return self(total), total


def make_norm(config: ModelConfig, ops: Ops) -> nn.Module:
    """The normalisation that `config` names, over the stream's width."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_eps, ops)
    return LayerNorm(config.d_model, config.norm_eps, config.bias)
