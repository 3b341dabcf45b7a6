"""Reference of the rotary position embedding, for whole sequences and into a cache."""

import torch
from torch import Tensor

from minillm.kernels.reference._wide import wide
from minillm.kernels.reference.norms import rms_norm


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Rotate the halves of each head by the angles of its position; with weights, norm heads first.

        [y1, y2] = [x1 cos - x2 sin, x2 cos + x1 sin],   x = [x1, x2]   (rotate-half layout)

    q: queries, (B, T, H, D), any float dtype
    k: keys, (B, T, G, D), any float dtype
    cos, sin: tables of the angles, (T, D/2), or (B, T, D/2) where rows differ
    q_weight, k_weight: weights of the QK-norm, an RMSNorm of each head, (D,); both or neither
    eps: added to the mean square in the QK-norm

    Returns q and k, rotated, in their shapes and dtypes.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34; QK-norm: Henry et al. 2020, arXiv:2010.04245.
    """
    if q_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T, 1, D/2)

    def rotate(x: Tensor) -> Tensor:
        x1, x2 = wide(x).chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)

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
    """Apply `rope` to new tokens and write their keys and values into the cache, while decoding.

        cache_k[b, p_b + t] = k'[b, t];   cache_v[b, p_b + t] = v[b, t]

    q: queries, (B, T, H, D), any float dtype
    k, v: keys and values, (B, T, G, D), any float dtype
    cos, sin: tables of the angles, (P, D/2), one row for each absolute position
    cache_k, cache_v: (B, S, G, D), S <= P, any float dtype; written in place
    positions: p_b, the position of the first new token of row b: (B,) integers, or one int for all
    q_weight, k_weight, eps: QK-norm, see `rope`

    Returns q', the rotated queries, (B, T, H, D), in q's dtype.
    """
    B, T = q.shape[:2]
    first = torch.as_tensor(positions, device=q.device).expand(B)
    where = first[:, None] + torch.arange(T, device=q.device)  # (B, T)
    q, k = rope(q, k, cos[where], sin[where], q_weight, k_weight, eps)
    rows = torch.arange(B, device=q.device)[:, None]
    cache_k[rows, where] = k.to(cache_k.dtype)
    cache_v[rows, where] = v.to(cache_v.dtype)
    return q
