"""AdamW and Newton-Schulz in PyTorch; kernels/reference/optim.py defines them."""

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from minillm.kernels._entrance import entrance


@entrance(forward_mode=True)
def newton_schulz(g: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Push the singular values of each matrix towards 1.

    The norm is computed, and g divided by it, in at least fp32, because fp16 holds neither the norm
    of large gradients nor small gradients.

    g: matrices, (..., M, N)
    steps: number of iterations
    dtype: dtype of every product, which may be bf16 (None: g's)
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = torch.promote_types(g.dtype, torch.float32)
    norm = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True, dtype=wide)
    x = (g / (norm + 1e-7)).to(dtype or g.dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.mT if tall else x


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
    """Take one step of AdamW in place, by PyTorch's fused kernel, once per pair of rate and decay.

    params, exp_avgs, exp_avg_sqs: parameters and their two moments, of equal shapes and dtypes
    grads: gradient of each parameter, any float dtype
    step: number of the step, from 1
    lr, weight_decay: learning rate and weight decay of each parameter
    betas, eps: decay rates of the moments, and the number added to the denominator
    grad_scale: factor of all gradients, () (None: 1)
    copies: tensors that receive the new values, any float dtype
    """
    grads = [g.to(p.dtype) for g, p in zip(grads, params, strict=True)]
    if grad_scale is not None:
        grads = torch._foreach_mul(grads, grad_scale)
    groups: dict[tuple[float, float], list[int]] = {}
    for i, pair in enumerate(zip(lr, weight_decay, strict=True)):
        groups.setdefault(pair, []).append(i)
    for (rate, decay), members in groups.items():
        lists = [[x[i] for i in members] for x in (params, grads, exp_avgs, exp_avg_sqs)]
        steps = [torch.full((), step - 1.0, device=p.device) for p in lists[0]]
        torch_adamw(
            *lists, [], steps, fused=params[0].device.type in ("cpu", "cuda"), amsgrad=False,
            beta1=betas[0], beta2=betas[1], lr=rate, weight_decay=decay, eps=eps, maximize=False,
        )  # fmt: skip
    if copies is not None:
        torch._foreach_copy_(copies, params)
