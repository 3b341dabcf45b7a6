"""Reference of attention, over a whole sequence and over a cache of keys and values."""

import math

import torch
from torch import Tensor

from minillm.kernels.reference._wide import wide


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int = 0,
    documents: Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return the causal attention of T queries over the same T positions.

        y_i = sum_j softmax_j(s_ij) v_j,   s_ij = cap(scale q_i.k_j) - slope (i - j),   j <= i
        cap(x) = softcap tanh(x / softcap), or x where softcap is 0

    q: queries, (B, T, H, D), any float dtype
    k, v: keys and values, (B, T, G, D); G divides H, and query head h reads head h // (H/G)
    scale: factor of the scores (None: 1/sqrt(D))
    window: each query sees only keys with i - j < window (0: all)
    documents: number of the document of each position, (B, T), integers that never fall along T;
        a query sees only keys of the same document
    softcap: bound of the scores (0: none)
    alibi_slopes: slope of each query head, (H,), Press et al. 2021, arXiv:2108.12409
    dropout: probability of dropping each attention weight

    Returns y, (B, T, H, D), in q's dtype.
    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; GQA: Ainslie et al. 2023,
    arXiv:2305.13245.
    """
    positions = torch.arange(q.shape[1], device=q.device).expand(q.shape[0], -1)
    seen = _seen(positions, positions, window)  # (B, T, S)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    distance = positions[:, :, None] - positions[:, None, :]
    return _attend(q, k, v, seen, distance, scale, softcap, alibi_slopes, dropout)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Return the causal attention of the last T positions over a cache of keys and values.

    The formula is that of `attention`. Query t of row b has position lengths[b] - T + t. Cache
    entries that no query of a row sees do not matter: they may even hold nan or infinities.

    q: queries, (B, T, H, D), any float dtype
    k, v: the cache, (B, S, G, D), of which row b holds lengths[b] entries
    lengths: entries of each row, (B,), integers (None: S for all)
    scale, window, softcap, alibi_slopes: see `attention`

    Returns y, (B, T, H, D), in q's dtype; zeros for a query that sees no key.
    """
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    if lengths is None:
        lengths = torch.full((B,), S, device=q.device)
    queries = lengths[:, None] - T + torch.arange(T, device=q.device)  # (B, T)
    keys = torch.arange(S, device=q.device).expand(B, S)
    seen = _seen(queries, keys, window)
    used = seen.any(1)[:, :, None, None]  # (B, S, 1, 1)
    k, v = (torch.where(used, x, 0) for x in (k, v))
    distance = queries[:, :, None] - keys[:, None, :]
    return _attend(q, k, v, seen, distance, scale, softcap, alibi_slopes, 0.0)


def cap(scores: Tensor, softcap: float) -> Tensor:
    """Return softcap tanh(scores / softcap), or the scores unchanged where softcap is 0.

    scores: scores or logits, any shape
    softcap: bound of the result (0: none)
    """
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _seen(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Return (B, T, S): True where a query at its position sees a key at its position."""
    distance = queries[:, :, None] - keys[:, None, :]
    seen = distance >= 0
    return seen & (distance < window) if window else seen


def _attend(q, k, v, seen, distance, scale, softcap, alibi_slopes, dropout) -> Tensor:
    """Return the attention over the keys that are seen; seen and distance are (B, T, S)."""
    D, share = q.shape[-1], q.shape[2] // k.shape[2]
    k, v = (wide(x).repeat_interleave(share, dim=2) for x in (k, v))  # (B, S, H, D)
    scale = 1 / math.sqrt(D) if scale is None else scale
    scores = cap(torch.einsum("bthd,bshd->bhts", wide(q), k) * scale, softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None] * distance[:, None]
    weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
    weights = weights.masked_fill(~seen[:, None], 0)  # nan where a query sees no key
    weights = torch.nn.functional.dropout(weights, dropout)
    return torch.einsum("bhts,bshd->bthd", weights, v).to(q.dtype)
