"""Clip gradients: compute the norm of all gradients and the factor that limits it."""

import torch
from torch import Tensor

STRETCH = 1 << 12  # elements whose squares fp32 adds up with a relative error of 1e-8


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements: () fp64, with a relative error of 1e-8.

    On CUDA it is computed from fp64 norms, on the device. Elsewhere it is summed, on the CPU, from
    fp32 norms of short stretches: a CPU's fp64 norm is slow, MPS has no fp64, and torch's fp32 norm
    of millions of elements is wrong by 1e-4.
    """
    tensors = [x for x in tensors if x.numel()]
    if not tensors:
        return torch.zeros((), dtype=torch.float64)  # this rank holds no gradient
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square().sum()
    stretches = [part for x in tensors for part in x.reshape(-1).split(STRETCH)]
    norms = torch._foreach_norm(stretches)
    return torch.stack(norms).cpu().double().square().sum()


def clip_factor(norm: Tensor, limit: float, scale: float = 1.0) -> Tensor | None:
    """Return the factor that gives gradients a total norm of at most `limit`, and unscales them.

    norm: () the total norm of the gradients before they were multiplied by `scale`
    limit: largest total norm; 0: no limit
    scale: factor by which the gradients have been multiplied, see loss_scale.py

    The result is () on the device of `norm`, so that no device is waited for. None stands for 1.
    """
    if not limit:
        return None if scale == 1 else torch.full_like(norm, 1 / scale)
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    return factor if scale == 1 else factor / scale
