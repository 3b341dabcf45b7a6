"""Random numbers for drawing tokens, made on the host; eager.py hands them on."""

import torch
from torch import Tensor


def uniform(seed: int, samples: Tensor, positions: Tensor) -> Tensor:
    """As reference.uniform, in Python's integers: for a few rows faster than thirty tensor ops."""
    draws = []
    for row, position in zip(samples.tolist(), positions.tolist(), strict=True):
        state = 0
        for word in (seed, row, position):
            state = _mix(_mix((state + word + 0x9E3779B97F4A7C15) & MASK))
        draws.append((state >> 40) / (1 << 24))
    return torch.tensor(draws, dtype=torch.float32, device=samples.device)


MASK = (1 << 64) - 1


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)
