"""Reference of drawing tokens: counter-based random numbers, and filtered sampling."""

import math

import torch
from torch import Tensor

from minillm.kernels.reference._wide import wide


def uniform(seed: int, samples: Tensor, positions: Tensor) -> Tensor:
    """Return numbers in [0, 1) of 24 random bits, functions of (seed, sample, position) alone.

        z <- 0;   for each of the three words w:  z <- mix(mix(z + w + 0x9E3779B97F4A7C15))
        u = floor(z / 2^40) / 2^24,   mix the finaliser of splitmix64, all modulo 2^64

    seed: any integer, taken modulo 2^64
    samples, positions: number of the sample, and of the token in it, (B,), int64

    Returns u, (B,), fp32.
    Source: Steele et al. 2014, "Fast splittable pseudorandom number generators", section 4.
    """
    state = torch.zeros_like(samples)
    for word in (_signed(seed), samples, positions):
        state = _mix(_mix(state + word + _signed(0x9E3779B97F4A7C15)))
    return _shifted(state, 40).float() / (1 << 24)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Return z >> bits, with the int64 z read as unsigned."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """Return the int64 that has the bits of a 64-bit word."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def sample(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Draw one token for each row by inverse transform, filters in the order of the arguments.

        p = softmax(logits / temperature) -> keep the top_k largest -> keep the smallest set of
        largest with mass >= top_p -> keep p >= min_p max(p);   token = min {t: cdf(t) > u cdf(V)}

    Each filter renormalises, and keeps ties at its border.

    logits: (B, V), any float dtype
    uniform: u of each row, (B,), in [0, 1)
    temperature: divisor of the logits (0: take the first of the largest logits)
    top_k: number of tokens to keep (0: all)
    top_p: probability mass to keep (1: all)
    min_p: least probability to keep, as a share of the largest (0: all)

    Returns tokens, (B,), int64.
    Source: top-p: Holtzman et al. 2019, arXiv:1904.09751; min-p: Nguyen et al. 2024,
    arXiv:2407.01082.
    """
    logits = wide(logits)
    if temperature == 0:
        return logits.argmax(-1)
    # A temperature below 1e-30 would be 0 in fp32, and 0 / 0 of the largest logit nan.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    if 0 < top_k < logits.shape[-1]:
        border = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < border, -math.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        ordered = p.sort(dim=-1, descending=True).values
        needed = (ordered.cumsum(-1) - ordered < top_p).sum(-1, keepdim=True).clamp(min=1)
        p = p.masked_fill(p < ordered.gather(-1, needed - 1), 0)
    if min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    cdf = p.double().cumsum(-1)
    # right=True: the first token whose cdf is strictly above u, so a token without mass never wins.
    token = torch.searchsorted(cdf, uniform.double()[:, None] * cdf[:, -1:], right=True).squeeze(-1)
    return token.clamp(max=logits.shape[-1] - 1)
