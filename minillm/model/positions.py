"""Position schemes, and the table of them by name.

To add one, write a subclass of NoPositions here, give it a row in POSITIONS, and add its name to
POSITIONS in config/model.py; a test compares the two.
Shapes: B batch, T time, C width of the residual stream, D head width, H query heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minillm.config.model import ModelConfig


class NoPositions(nn.Module):
    """Model without position encoding, and the interface of all schemes.

    scales_embedding: whether embedded tokens are multiplied by sqrt(C) before `encode`
    """

    scales_embedding = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def encode(self, x: Tensor, at: Tensor | slice) -> Tensor:
        """Return the embedded tokens with their positions.

        x: embedded tokens, (B, T, C)
        at: positions, (T,) or (B, T) int64, or a slice of them
        """
        return x

    def rotation(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        """Return cosines and sines of the rotary angles of positions, (rows, D/2) each, or None."""
        return None


class RotaryPositions(NoPositions):
    """Rotation of queries and keys by angles that grow with the position; see `rope_tables`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        cos, sin = rope_tables(config.seq_len, config.d_head, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def rotation(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return rows of the tables of cosines and sines, (rows, D/2) fp32 each."""
        return self.cos[rows], self.sin[rows]


class LearnedPositions(NoPositions):
    """Learned vector of each position, added to the embedded token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.seq_len, config.d_model))
        nn.init.normal_(self.weight)

    def encode(self, x: Tensor, at: Tensor | slice) -> Tensor:
        """Return x + weight[at], (B, T, C).

        x, at: see NoPositions.encode
        """
        return x + self.weight[at]


class SinusoidalPositions(NoPositions):
    """Fixed sines and cosines, added to the scaled embedding; see `sinusoidal_table`."""

    scales_embedding = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        table = sinusoidal_table(config.seq_len, config.d_model)
        self.register_buffer("table", table, persistent=False)

    def encode(self, x: Tensor, at: Tensor | slice) -> Tensor:
        """Return x + table[at], (B, T, C).

        x, at: see NoPositions.encode
        """
        return x + self.table[at]


def rope_tables(seq_len: int, d_head: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of position x base^(-2i/D), (seq_len, D/2) fp32 each.

    seq_len: number of positions
    d_head: head width D, an even number
    base: base of the frequencies
    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    frequencies = base ** -(torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def sinusoidal_table(seq_len: int, width: int) -> Tensor:
    """Return sines in even columns and cosines in odd ones, (seq_len, width) fp32.

    seq_len: number of positions
    width: width of the residual stream, an even number
    Source: Vaswani et al. 2017, arXiv:1706.03762, sections 3.4 and 3.5.
    """
    angles = rope_tables(seq_len, width, 10000.0)
    return torch.stack((angles[1], angles[0]), dim=-1).flatten(1)


def alibi_slopes(n_head: int) -> Tensor:
    """Return the slope of each head's distance penalty, (H,) fp32.

    The slopes are 2^(-8 h / H) for h = 1..H. Between powers of two, those of the power below come
    first, and odd ones of the power above follow.

    n_head: number of query heads H
    Source: Press et al. 2021, arXiv:2108.12409, section 3, and the authors' code for other H.
    """
    power = 1 << (n_head.bit_length() - 1)
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * (n_head - power), 2)]
    return torch.tensor(slopes)


@dataclass(frozen=True)
class PositionKind:
    """Row of POSITIONS. The FLOPs of positions are not counted.

    build: makes the scheme
    parameters: returns the number of its parameters
    slopes: returns the slope of each head's distance penalty, (H,) fp32, or None
    """

    build: Callable[[ModelConfig], NoPositions]
    parameters: Callable[[ModelConfig], int] = lambda c: 0
    slopes: Callable[[ModelConfig], Tensor | None] = lambda c: None


POSITIONS = {
    "rope": PositionKind(RotaryPositions),
    "learned": PositionKind(LearnedPositions, parameters=lambda c: c.seq_len * c.d_model),
    "sinusoidal": PositionKind(SinusoidalPositions),
    "alibi": PositionKind(NoPositions, slopes=lambda c: alibi_slopes(c.n_head)),
    "none": PositionKind(NoPositions),
}
