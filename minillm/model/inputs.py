"""Inputs of a pass besides the residual stream, and the checks of tokens, masks and caches.

Shapes: B batch, T time, C width, D head width, P rows of the rotary tables.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minillm.config.model import ModelConfig
from minillm.model.kv_cache import KVCache


@dataclass(frozen=True)
class BlockInputs:
    """Inputs that every block of a pass gets besides the residual stream.

    positions: positions of the tokens in their rows, (T,) or (B, T) int64, or a slice of them
    rotation: cosines and sines of the rotary angles, (T, D/2) or (P, D/2) each, or None
    documents: number of each token's document, (B, T) int64, or None if there is one in each row
    cache: keys and values of the earlier tokens, to which those of these are added, or None
    """

    positions: Tensor | slice
    rotation: tuple[Tensor, Tensor] | None
    documents: Tensor | None
    cache: KVCache | None


@dataclass(frozen=True)
class CoreState:
    """A pass that has stopped between two iterations of the core.

    Without a core it has stopped between the blocks and the last norm.

    inputs: inputs of the blocks
    text: part of the embedded text that the injection adds in each iteration, (B, T, C), or None
        without a core
    state: state after `done` iterations, (B, T, C)
    done: iterations that have run
    """

    inputs: BlockInputs
    text: Tensor | None
    state: Tensor
    done: int = 0

    def select_rows(self, rows: list[int] | Tensor, cache: KVCache | None = None) -> "CoreState":
        """Return a copy with some rows of the batch only.

        rows: indices of the rows
        cache: KV cache that holds these rows only, if there is one
        """
        index = torch.as_tensor(rows, device=self.state.device)
        inputs = self.inputs
        at = inputs.positions
        at = at[index] if isinstance(at, Tensor) and at.dim() == 2 else at
        documents = None if inputs.documents is None else inputs.documents[index]
        inputs = replace(inputs, positions=at, documents=documents, cache=cache)
        return replace(self, inputs=inputs, text=self.text[index], state=self.state[index])


def positions_of(
    tokens: Tensor, cache: KVCache | None, attention_mask: Tensor | None
) -> tuple[Tensor | slice, Tensor | None]:
    """Return the positions of tokens, and with a mask the number of each token's segment.

    Positions are (T,) or (B, T) int64, or a slice of them; segments are as in `split_at_padding`.

    tokens: tokens, (B, T) int64
    cache: earlier tokens, which these follow, or None
    attention_mask: (B, T), 0 where a row is padded, or None
    Raises ValueError on a mask with a cache, of another shape than the tokens, or with a hole.
    """
    T = tokens.shape[1]
    if attention_mask is not None:
        if cache is not None:
            raise ValueError("an attention mask and a cache exclude each other")
        if attention_mask.shape != tokens.shape:
            found, wanted = tuple(attention_mask.shape), tuple(tokens.shape)
            raise ValueError(f"attention_mask is {found}; expected {wanted}, as the tokens are")
        return split_at_padding(attention_mask.bool())
    if cache is not None and not cache.equal_lengths():
        return cache.positions(T), None
    held = 0 if cache is None else cache.lengths[0]
    return slice(held, held + T), None


def split_at_padding(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions of the tokens in their rows, and numbers of segments, (B, T) int64 each.

    A row falls into at most three segments: padding, tokens, padding.

    mask: (B, T) bool, False where a row is padded
    Raises ValueError if there is padding between tokens.
    """
    starts = mask & ~mask.roll(1, 1)
    starts[:, 0] = mask[:, 0]
    if (starts.sum(1) > 1).any():
        raise ValueError("the attention mask has a hole: padding stands before or after tokens")
    changes = mask[:, 1:] != mask[:, :-1]
    segments = torch.cat([torch.zeros_like(mask[:, :1]), changes], 1).long().cumsum(1)
    return (mask.long().cumsum(1) - 1).clamp(min=0), segments


def documents_of(
    config: ModelConfig, tokens: Tensor, cache: KVCache | None, segments: Tensor | None
) -> Tensor | None:
    """Return the number of each token's document, (B, T) int64, or None if nothing is masked.

    Attention stays within a document. Padding counts as a separate document.

    config: shape of the model
    tokens: tokens, (B, T) int64
    cache: earlier tokens, which are in the same document, or None
    segments: result of `split_at_padding`, or None
    """
    documents = None
    if config.document_mask and cache is None:
        documents = (tokens == config.bos_id).cumsum(1)
    if segments is None:
        return documents
    return segments if documents is None else documents + segments * (tokens.shape[1] + 1)


def check_continuation(
    config: ModelConfig, tokens: Tensor, cache: KVCache, iterations: int
) -> None:
    """Raise ValueError if the model would read tokens wrongly after those in a cache.

    This happens if the cache has another number of rows, if it lacks keys and values of an
    iteration that the tokens would attend to, or if a token begins another document.

    config: shape of the model
    tokens: new tokens, (B, T) int64
    cache: cache of the earlier tokens
    iterations: iterations of the core that will run for them; 0 without a core
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


def mask_padding_targets(targets: Tensor, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the targets, (B, T) int64, with -100 at padding.

    targets: target tokens, (B, T) int64
    tokens: input tokens, (B, T) int64
    attention_mask: (B, T), 0 where a row is padded, or None if nothing is
    Raises ValueError if the shape of the targets is not that of the tokens.
    """
    if targets.shape != tokens.shape:
        found, wanted = tuple(targets.shape), tuple(tokens.shape)
        raise ValueError(f"targets are {found}; expected {wanted}, as the tokens are")
    return targets if attention_mask is None else targets.masked_fill(attention_mask == 0, -100)
