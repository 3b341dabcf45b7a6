"""Rotary position embedding in the dtype of q; kernels/reference/rope.py defines it."""

import torch
from torch import Tensor

from minillm.kernels.eager.norms import rms_norm


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return q and k with each head rotated by the angles of its position.

    q, k: queries, (B, T, H, D), and keys, (B, T, G, D)
    cos, sin: tables of the angles, (T, D/2) or (B, T, D/2)
    q_weight, k_weight: weights of the QK-norm, (D,); both or neither
    eps: added to the mean square in the QK-norm
    """
    if q_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    # (..., T, 1, D/2); in q's dtype, because fp32 tables would make every product fp32.
    cos, sin = (table.unsqueeze(-2).to(q.dtype) for table in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)

    return rotate(q), rotate(k)


def rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    positions: Tensor | int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Return the rotated q, (B, T, H, D), and write the rotated k, and v, into the cache.

    One position for all rows becomes a slice, which is faster than an index.

    q: queries, (B, T, H, D)
    k, v: keys and values, (B, T, G, D)
    cos, sin: one row for each absolute position, (P, D/2)
    cache_k, cache_v: (B, S, G, D), written in place
    positions: position of the first new token of each row, (B,), or one int for all
    q_weight, k_weight, eps: QK-norm, see `rope`
    """
    B, T = q.shape[:2]
    if isinstance(positions, int):
        rows, where = slice(None), slice(positions, positions + T)
    else:
        where = positions[:, None] + torch.arange(T, device=q.device)  # (B, T)
        rows = torch.arange(B, device=q.device)[:, None]
    q, k = rope(q, k, cos[where], sin[where], q_weight, k_weight, eps)
    cache_k[rows, where] = k.to(cache_k.dtype)
    cache_v[rows, where] = v.to(cache_v.dtype)
    return q
