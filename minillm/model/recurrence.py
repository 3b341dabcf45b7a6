"""Recurrent depth: the number of iterations of a training step, and the initial state of the core.

Source: Geiping et al. 2025, arXiv:2502.05171, section 3.
Shapes: B batch, T time, C width of the residual stream.
"""

import math

import numpy as np
import torch
from torch import Tensor

from minillm.config.model import ModelConfig

SIGMA = 0.5  # standard deviation of the logarithm of the Poisson's rate
CUT = 3.0  # standard deviations at which noise is cut off
VARIANCE = 2 / 5  # variance of the noise before the cut


def draw(seed: int, step: int, groups: int, mean: float, cap: int) -> list[int]:
    """Draw the number of iterations r of each group of sequences in a training step.

        r = min(cap, 1 + Poisson(lambda)),   ln lambda ~ N(ln(mean - 1) - SIGMA^2 / 2, SIGMA)

    Each draw has a separate counter-based generator, keyed (seed, step, group), so that ranks,
    micro-batches and resumed runs draw the same numbers.

    seed: seed of the run
    step: number of the training step
    groups: number of groups
    mean: mean of r before it is capped; 1 gives 1 always
    cap: largest r
    Source: section 3.3 of the paper; its mean is one above the one it names.
    """
    if mean <= 1:
        return [1] * groups
    found = []
    for group in range(groups):
        numbers = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step, group])))
        rate = math.exp(math.log(mean - 1) - SIGMA**2 / 2 + SIGMA * numbers.standard_normal())
        found.append(min(cap, 1 + int(numbers.poisson(rate))))
    return found


def state_keys(seed: int, samples: Tensor) -> Tensor:
    """Return the keys of initial states, (B,) int64.

    seed: seed of the run, or of the sampling
    samples: numbers of the samples, (B,) int64
    """
    return _mix64(_mix64(samples + _signed64(seed * 0x9E3779B97F4A7C15)))


def start_noise(keys: Tensor, positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return normal noise of variance 2/5, cut at three deviations, (B, T, width).

    Each number is a function of its key, position and column alone, on every device. A token that
    is read later, or in another row of a batch, therefore starts from the same state.

    keys: result of `state_keys`, (B,) int64
    positions: absolute positions, (T,) or (B, T) int64
    width: width of the residual stream
    dtype: dtype of the result
    """
    if positions.dim() == 1:
        positions = positions[None]
    word = _mix64(keys[:, None] + _mix64(positions + 1))  # (B, T)
    low, high = (_int32(word >> shift)[..., None] for shift in (0, 32))
    columns = torch.arange(width, dtype=torch.int32, device=keys.device)
    x = _mix32(_mix32(columns * _signed32(0x9E3779B9) + low) + high)  # (B, T, width)
    u = (x >> 8 & 0xFFFFFF).float().add_(0.5).mul_(2.0**-23).sub_(1)  # (-1, 1)
    z = u.mul_(math.erf(CUT / math.sqrt(2))).erfinv_()
    return z.mul_(math.sqrt(2 * VARIANCE)).to(dtype)


def initial_state(
    config: ModelConfig, like: Tensor, keys: Tensor | None, positions: Tensor | slice
) -> Tensor:
    """Return zeros or noise, as `config.start_state` names it: (B, T, C).

    config: shape of the model
    like: tensor whose shape, (B, T, C), dtype and device the state gets
    keys: result of `state_keys`, (B,) int64; default: zeros
    positions: absolute positions, (T,) or (B, T) int64, or a slice of them
    Raises ValueError if there is not one key for each row.
    """
    if config.start_state == "zero":
        return torch.zeros_like(like)
    B, _, C = like.shape
    if keys is None:
        keys = torch.zeros(B, dtype=torch.int64, device=like.device)
    if keys.shape != (B,):
        raise ValueError(f"keys are {tuple(keys.shape)}; expected ({B},), one for each row")
    if isinstance(positions, slice):
        positions = torch.arange(positions.start, positions.stop, device=like.device)
    return start_noise(keys, positions, C, like.dtype)


def _mix64(z: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64 (Steele et al. 2014, section 4), modulo 2^64."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed64(0x94D049BB133111EB)
    return z ^ (z >> 31 & (1 << 33) - 1)


def _mix32(x: Tensor) -> Tensor:
    """Apply lowbias32, a bijection (C. Wellons 2018, "Prospecting for hash functions")."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * _signed32(0x846CA68B)
    return x ^ (x >> 16 & 0xFFFF)


def _int32(x: Tensor) -> Tensor:
    """Return the low 32 bits of int64 numbers as int32."""
    return ((x & 0xFFFFFFFF ^ 0x80000000) - 0x80000000).to(torch.int32)


def _signed64(word: int) -> int:
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


def _signed32(word: int) -> int:
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)
