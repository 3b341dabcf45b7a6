"""Reference of the activations of the MLP."""

import math

import torch
from torch import Tensor

from minillm.kernels.reference._wide import wide


def swiglu(x: Tensor) -> Tensor:
    """Multiply one half of x by the SiLU of the other.

        y = silu(gate) * up,   x = [gate, up],   silu(z) = z sigmoid(z)

    x: gate and up, as one matrix product gives both, (..., 2F), any float dtype

    Returns y, (..., F), in x's dtype.
    Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """
    gate, up = wide(x).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def geglu(x: Tensor) -> Tensor:
    """Multiply one half of x by the exact GELU of the other.

        y = gelu(gate) * up,   x = [gate, up],   gelu(z) = z Phi(z)

    x: gate and up, as one matrix product gives both, (..., 2F), any float dtype

    Returns y, (..., F), in x's dtype.
    Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """
    gate, up = wide(x).chunk(2, dim=-1)
    return (gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up).to(x.dtype)


def relu2(x: Tensor) -> Tensor:
    """Return the squared ReLU of x, y = max(x, 0)^2.

    x: any shape, any float dtype

    Returns y, in x's shape and dtype.
    Source: So et al. 2021, arXiv:2109.08668, section 3.1.
    """
    return wide(x).clamp(min=0).square().to(x.dtype)
