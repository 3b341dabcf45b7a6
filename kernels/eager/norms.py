"""Norms through PyTorch's RMSNorm; kernels/reference/norms.py defines them."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale each row of x to a root mean square of 1, then multiply it by w.

    x: rows, (..., C)
    w: weight, (C,)
    eps: added to the mean square
    """
    return F.rms_norm(x, (x.shape[-1],), w.to(x.dtype), eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, w: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Return rms_norm(s, w) and s = x + residual, both (..., C).

    x, residual: the branch and the residual stream, (..., C)
    w: weight, (C,)
    eps: added to the mean square
    """
    s = x + residual
    return rms_norm(s, w, eps), s


def sandwich_norm(
    x: Tensor, residual: Tensor, w_post: Tensor, w_pre: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Return rms_norm(h, w_pre) and h = rms_norm(x + residual, w_post), both (..., C).

    x, residual: the branch and the residual stream, (..., C)
    w_post, w_pre: weights of the two norms, (C,)
    eps: added to both mean squares
    """
    h = rms_norm(x + residual, w_post, eps)
    return rms_norm(h, w_pre, eps), h
