"""Reference of the operations of optimizers: AdamW, and the Newton-Schulz iteration of Muon."""

import torch
from torch import Tensor

from minillm.kernels.reference._wide import wide


def newton_schulz(g: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Push the singular values of each matrix towards 1 (about 0.7 to 1.2 after five steps).

        X <- G / (|G|_F + 1e-7), then in each step A = X X^T;   X <- a X + (b A + c A A) X

    g: matrices, (..., M, N), any float dtype
    steps: number of iterations
    dtype: dtype of the result (None: g's). A fast implementation may round X to it once X is
        normalised

    Returns X, (..., M, N), in that dtype.
    Source: Jordan et al. 2024, "Muon", coefficients (3.4445, -4.7750, 2.0315).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = wide(g)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return (x.mT if tall else x).to(dtype or g.dtype)


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    *,
    lr: list[float],
    weight_decay: list[float],
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    grad_scale: Tensor | None = None,
    copies: list[Tensor] | None = None,
) -> None:
    """Take one step of AdamW over all parameters, in place.

        g <- grad_scale g;   m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
        p <- (1 - lr wd) p - lr (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps)

    params, exp_avgs, exp_avg_sqs: p, m and v, of equal shapes, fp32 (or fp64)
    grads: g of each parameter, any float dtype
    step: number of the step, from 1
    lr, weight_decay: learning rate and weight decay of each parameter
    betas, eps: b1 and b2, and eps of the formula
    grad_scale: factor of gradient clipping, (), fp32, on the parameters' device (None: 1)
    copies: tensors of the parameters' shapes, any float dtype, that receive the new values

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.
    """
    b1, b2 = betas
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = g.to(p.dtype) if grad_scale is None else g.to(p.dtype) * grad_scale.to(p.dtype)
        m.mul_(b1).add_(g, alpha=1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        denominator = (v / (1 - b2**step)).sqrt() + eps
        p.mul_(1 - lr[i] * weight_decay[i])
        p.addcdiv_(m / (1 - b1**step), denominator, value=-lr[i])
        if copies is not None:
            copies[i].copy_(p)
