"""Reference of the norms: RMSNorm, alone, after an addition, and twice in a sandwich block."""

import torch
from torch import Tensor

from minillm.kernels.reference._wide import wide


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale each row of x to a root mean square of 1, then multiply it by w.

        y = x / sqrt(mean(x^2, -1) + eps) * w

    x: rows, (..., C), any float dtype
    w: weight, (C,), any float dtype
    eps: added to the mean square

    Returns y, (..., C), in x's dtype.
    Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    x32 = wide(x)
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * rstd * w).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, w: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum.

        s = x + residual (rounded to x's dtype);   y = rms_norm(s, w)

    x: the branch, (..., C), any float dtype
    residual: the residual stream, (..., C), in x's dtype
    w: weight, (C,)
    eps: added to the mean square

    Returns y and s, both (..., C), in x's dtype.
    """
    s = (wide(x) + wide(residual)).to(x.dtype)
    return rms_norm(s, w, eps), s


def sandwich_norm(
    x: Tensor, residual: Tensor, w_post: Tensor, w_pre: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Close one half of a sandwich block and open the next.

        h = rms_norm(x + residual, w_post) (rounded to x's dtype);   y = rms_norm(h, w_pre)

    h is the new residual stream. A sandwich block normalises the stream itself, which bounds it
    however often the block runs.

    x: the branch, (..., C), any float dtype
    residual: the residual stream, (..., C), in x's dtype
    w_post, w_pre: weights of the two norms, (C,)
    eps: added to both mean squares

    Returns y and h, both (..., C), in x's dtype.
    Source: Geiping et al. 2025, arXiv:2502.05171, section 3.2.
    """
    h, _ = add_rms_norm(x, residual, w_post, eps)
    return rms_norm(h, w_pre, eps), h
