"""Activations of the MLP in PyTorch; kernels/reference/mlp.py defines them."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * up, (..., F), of x = [gate, up], (..., 2F)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(x: Tensor) -> Tensor:
    """Return gelu(gate) * up, (..., F), of x = [gate, up], (..., 2F)."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate) * up


def relu2(x: Tensor) -> Tensor:
    """Return max(x, 0)^2, in the shape of x."""
    return F.relu(x).square()
