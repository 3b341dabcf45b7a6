"""Recurrent depth: how often the core runs, where it starts, and how the text enters each time.

What this room does not do: know blocks. model.py runs them; it asks here for the rest.
Source: Geiping et al. 2025, arXiv:2502.05171, section 3.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from minillm.config.model import ModelConfig
from minillm.model.linear import Linear
from minillm.model.norms import make_norm
from minillm.ops import Ops

SIGMA = 0.5  # of the logarithm of the Poisson's rate
CUT = 3.0  # standard deviations at which start states end
VARIANCE = 2 / 5  # of start states, before the cut


def draw(seed: int, step: int, groups: int, mean: float, cap: int) -> list[int]:
    """How often the core runs for each group of sequences in a step; a function of the arguments.

        r = min(cap, 1 + Poisson(lambda)),   ln lambda ~ N(ln(mean - 1) - SIGMA^2 / 2, SIGMA)

    mean: of r, but for the cap. At 1, r is 1. Each draw has a counter-based generator of its own,
    keyed (seed, step, group), so that ranks, micro-batches and resumed runs draw the same.
    Source: section 3.3 there; its mean is one above what it names.
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
    """(B,) int64 keys of start states from a seed and the numbers of the samples, (B,) int64."""
    return _mix64(_mix64(samples + _signed64(seed * 0x9E3779B97F4A7C15)))


def start_noise(keys: Tensor, positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Start states, normal of variance 2/5, cut at three standard deviations: (B, T, width).

    keys: (B,) int64.    positions: (T,) or (B, T) int64, absolute.    Each number is a function of
    its key, position and column alone, on every device, so that a token read later, or in another
    row of a batch, starts where it would have started.
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


def _mix64(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014, section 4), modulo 2^64."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed64(0x94D049BB133111EB)
    return z ^ (z >> 31 & (1 << 33) - 1)


def _mix32(x: Tensor) -> Tensor:
    """A bijection of 32 bits: C. Wellons 2018, "Prospecting for hash functions", lowbias32."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * _signed32(0x846CA68B)
    return x ^ (x >> 16 & 0xFFFF)


def _int32(x: Tensor) -> Tensor:
    """The low 32 bits of int64, as int32."""
    return ((x & 0xFFFFFFFF ^ 0x80000000) - 0x80000000).to(torch.int32)


def _signed64(word: int) -> int:
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


def _signed32(word: int) -> int:
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)


class Injection(nn.Module):
    """How the embedded text e enters the state s at the start of each iteration.

        concat:    A [s; e] = A_s s + A_e e, the latter computed once a pass
        add:       s + e
        diagonal:  exp(-softplus(b) exp(a)) s + softplus(b) B e, of a decay between 0 and 1,
                   taken and multiplied in fp32

    The style parcae normalises e first. Sources: concat and add: section 3.2 of the paper above;
    diagonal: Parcae, arXiv:2604.12946.
    """

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        C, self.kind = config.d_model, config.injection
        self.norm = make_norm(config, ops) if config.recurrence_style == "parcae" else None
        if self.kind == "concat":
            self.state = Linear(C, C, bias=False)
        if self.kind != "add":
            self.text = Linear(C, C, bias=False)
        if self.kind == "diagonal":
            self.rate = nn.Parameter(torch.zeros(C))  # a
            self.step = nn.Parameter(torch.zeros(C))  # b

    def prepare(self, e: Tensor) -> Tensor:
        """What of e each iteration takes, computed once.    e, result: (B, T, C)."""
        if self.norm is not None:
            e = self.norm(e)
        if self.kind == "add":
            return e
        e = self.text(e)
        return e * nn.functional.softplus(self.step).to(e.dtype) if self.kind == "diagonal" else e

    def forward(self, s: Tensor, prepared: Tensor) -> Tensor:
        """The state with the text in it.    s, prepared, result: (B, T, C)."""
        if self.kind == "concat":
            return self.state(s) + prepared
        if self.kind == "diagonal":
            # At least fp32, where a decay just below 1 stays below it; in bf16 0.999 would be 1.
            wide = torch.promote_types(s.dtype, torch.float32)
            decay = torch.exp(
                -nn.functional.softplus(self.step.to(wide)) * self.rate.to(wide).exp()
            )
            return (decay * s + prepared).to(s.dtype)
        return s + prepared
