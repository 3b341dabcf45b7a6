"""The tables by which positions enter a model: rotary angles, sinusoids, ALiBi's slopes."""

import torch
from torch import Tensor


def rope_tables(seq_len: int, d_head: int, base: float) -> tuple[Tensor, Tensor]:
    """cos, sin of position x base^(-2i/D): (seq_len, D/2) each, fp32.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    frequencies = base ** -(torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def sinusoidal_table(seq_len: int, width: int) -> Tensor:
    """(seq_len, width) fp32: sine in even columns, cosine in odd ones; added to sqrt(C) embed.

    Source: Vaswani et al. 2017, arXiv:1706.03762, sections 3.4 and 3.5.
    """
    angles = rope_tables(seq_len, width, 10000.0)
    return torch.stack((angles[1], angles[0]), dim=-1).flatten(1)


def alibi_slopes(n_head: int) -> Tensor:
    """(H,) fp32: 2^(-8 h / H), h = 1..H; between powers of two the next power's odd ones are added.

    Source: Press et al. 2021, arXiv:2108.12409, section 3, and the authors' code for other H.
    """
    power = 1 << (n_head.bit_length() - 1)
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * (n_head - power), 2)]
    return torch.tensor(slopes)


def unpadded(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) positions of the tokens in their rows, and numbers of the pieces that rows fall into:
    padding, tokens, padding.    mask: (B, T), False where a row is padded.
    Raises ValueError if padding stands between tokens.
    """
    starts = mask & ~mask.roll(1, 1)
    starts[:, 0] = mask[:, 0]
    if (starts.sum(1) > 1).any():
        raise ValueError("the attention mask has a hole: padding stands before or after tokens")
    changes = mask[:, 1:] != mask[:, :-1]
    pieces = torch.cat([torch.zeros_like(mask[:, :1]), changes], 1).long().cumsum(1)
    return (mask.long().cumsum(1) - 1).clamp(min=0), pieces
