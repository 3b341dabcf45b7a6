"""Where tokens stand: what every block is told beside the stream.

Shapes: B batch, T time.
"""

from dataclasses import dataclass

from torch import Tensor

from minillm.config.model import ModelConfig
from minillm.model.kv_cache import KVCache


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


def check_cached(config: ModelConfig, tokens: Tensor, cache: KVCache, iterations: int) -> None:
    """Raise ValueError where tokens, (B, T), that follow those of a cache would be read wrongly.

    iterations: how often the core runs for them; 0: there is none.
    """
    B = tokens.shape[0]
    if len(cache.lengths) != B:
        raise ValueError(f"tokens have {B} rows and the cache has {len(cache.lengths)}")
    needed = min(iterations, cache.iterations)
    held = [n for n, length in zip(cache.reached, cache.lengths, strict=True) if length]
    if held and min(held) < needed:
        raise ValueError(
            f"recurrence {iterations}: the cache has keys and values of {min(held)} iterations of "
            f"what stands before; use recurrence {min(held)} or less, or read it again"
        )
    if config.document_mask:
        later = tokens == config.bos_id
        # The first token of a row that is empty begins its only document.
        later[:, 0] &= later.new_tensor([length > 0 for length in cache.lengths])
        if later.any():
            raise ValueError(
                "tokens begin another document (bos_id), and document_mask does not work with a "
                "cache: read each document with a cache of its own, or without one"
            )


def counting(targets: Tensor, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The targets, (B, T), without those at padding.

    Raises ValueError if their shape is not that of the tokens.
    """
    if targets.shape != tokens.shape:
        told, wanted = tuple(targets.shape), tuple(tokens.shape)
        raise ValueError(f"targets are {told}; expected {wanted}, as the tokens are")
    return targets if attention_mask is None else targets.masked_fill(attention_mask == 0, -100)
