"""Where tokens stand: what every block is told beside the stream.

Shapes: B batch, T time.
"""

from dataclasses import dataclass

from torch import Tensor

from minillm.cache import KVCache


@dataclass(frozen=True)
class Place:
    """Where tokens stand, the same for every block.

    at: (T,) or (B, T) int64 positions, or a slice of them.
    rotation: cosines and sines.
    documents: (B, T), the number of each token's document.
    cache: what stands before the tokens, and where they go.
    """

    at: Tensor | slice
    rotation: tuple[Tensor, Tensor] | None
    documents: Tensor | None
    cache: KVCache | None
