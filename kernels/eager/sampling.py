"""Make random numbers on the host; the sampler is that of the reference, which is fast enough."""

import torch
from torch import Tensor

from minillm.kernels.reference.sampling import sample

__all__ = ["sample", "uniform"]

MASK = (1 << 64) - 1


def uniform(seed: int, samples: Tensor, positions: Tensor) -> Tensor:
    """Return one number in [0, 1) for each row, (B,), fp32, a function of (seed, sample, position).

    Python's integers are faster than thirty tensor operations where there are few rows.

    seed: seed of the run
    samples: number of each row's sample, (B,), integers
    positions: position of each row's token, (B,), integers
    """
    draws = []
    for row, position in zip(samples.tolist(), positions.tolist(), strict=True):
        state = 0
        for word in (seed, row, position):
            state = _mix(_mix((state + word + 0x9E3779B97F4A7C15) & MASK))
        draws.append((state >> 40) / (1 << 24))
    return torch.tensor(draws, dtype=torch.float32, device=samples.device)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)
