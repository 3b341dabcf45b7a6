"""All the maths of the house in one place: pure PyTorch, slow, in at least fp32.

Every fast path (eager.py, the Triton kernels) has a function of the same name and signature and
answers to the one here. A change in this file changes meaning; a change elsewhere only speed.

Letters: B batch, T queries, S keys, C model width, H query heads, G key/value heads, D head width,
F MLP width, V vocabulary, N rows.
"""

import math

import torch
from torch import Tensor

from minillm.kernels.reference_optim import adamw, newton_schulz
from minillm.kernels.reference_sampling import sample, uniform

__all__ = [
    "adamw",
    "add_rms_norm",
    "attention",
    "decode_attention",
    "geglu",
    "linear_cross_entropy",
    "newton_schulz",
    "relu2",
    "rms_norm",
    "rope",
    "rope_cache",
    "sample",
    "sandwich_norm",
    "swiglu",
    "uniform",
]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale each row of x to unit root mean square, then by w.

        y = x / sqrt(mean(x^2, -1) + eps) * w

    x: (..., C) any float dtype.    w: (C,).    Returns (..., C) in x's dtype.
    Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    x32 = _wide(x)
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * rstd * w).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, w: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum, in one pass.

        s = x + residual (rounded to x's dtype);   y = rms_norm(s, w)

    x, residual: (..., C), one dtype.    w: (C,).    Returns y, s, both (..., C) in x's dtype.
    """
    s = (_wide(x) + _wide(residual)).to(x.dtype)
    return rms_norm(s, w, eps), s


def sandwich_norm(
    x: Tensor, residual: Tensor, w_post: Tensor, w_pre: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Close one half of a sandwich block and open the next, in one pass.

        h = rms_norm(x + residual, w_post) (rounded to x's dtype);   y = rms_norm(h, w_pre)

    h is the new residual stream: in a sandwich block the stream itself is normalised, which
    bounds it however often the block runs.    x, residual: (..., C).    w_post, w_pre: (C,).
    Returns y, h, both (..., C) in x's dtype.
    Source: Geiping et al. 2025, arXiv:2502.05171, section 3.2.
    """
    h, _ = add_rms_norm(x, residual, w_post, eps)
    return rms_norm(h, w_pre, eps), h


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Rotate the halves of each head by its position's angles; with weights, RMSNorm heads first.

        [y1, y2] = [x1 cos - x2 sin, x2 cos + x1 sin],   x = [x1, x2]   (rotate-half layout)

    q: (B, T, H, D).    k: (B, T, G, D).    cos, sin: (T, D/2), or (B, T, D/2) where rows differ.
    q_weight, k_weight: (D,) of the QK-norm, both or neither.
    Returns q, k rotated, in their dtypes.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34; QK-norm: Henry et al. 2020, arXiv:2010.04245.
    """
    if q_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T, 1, D/2)

    def rotate(x: Tensor) -> Tensor:
        x1, x2 = _wide(x).chunk(2, dim=-1)
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
    """`rope` of new tokens while decoding; their keys and values go straight into the cache.

        cache_k[b, p_b + t] = k'[b, t];   cache_v[b, p_b + t] = v[b, t]

    q: (B, T, H, D).    k, v: (B, T, G, D).    cos, sin: (P, D/2), rows by absolute position.
    cache_k, cache_v: (B, S, G, D), written in place, any float dtype, S <= P.
    positions: (B,) integers or one for all, p_b: where row b's first new token stands.
    Returns q', (B, T, H, D) in q's dtype.
    """
    B, T = q.shape[:2]
    first = torch.as_tensor(positions, device=q.device).expand(B)
    where = first[:, None] + torch.arange(T, device=q.device)  # (B, T)
    q, k = rope(q, k, cos[where], sin[where], q_weight, k_weight, eps)
    rows = torch.arange(B, device=q.device)[:, None]
    cache_k[rows, where] = k.to(cache_k.dtype)
    cache_v[rows, where] = v.to(cache_v.dtype)
    return q


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
    """Causal attention of T queries over the same T positions.

        y_i = sum_j softmax_j(s_ij) v_j,   s_ij = cap(scale q_i.k_j) - slope (i - j),   j <= i
        cap(x) = softcap tanh(x / softcap), or x where softcap is 0

    q: (B, T, H, D).    k, v: (B, T, G, D), G divides H; query head h reads k/v head h // (H/G).
    scale: 1/sqrt(D) if None.    window: see only i - j < window; 0 sees all.
    documents: (B, T) integers that never fall along T; a query sees only its own document's keys.
    alibi_slopes: (H,), Press et al. 2021, arXiv:2108.12409.    dropout: on the probabilities.
    Returns (B, T, H, D) in q's dtype.
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
    """Causal attention of the last T positions over a cache of keys; see `attention` for the rest.

    q: (B, T, H, D).    k, v: (B, S, G, D), of which row b holds lengths[b] entries; S if None.
    Query t of row b stands at position lengths[b] - T + t. Entries that no query of a row sees do
    not matter, whatever they are: nan and infinities too.
    Returns (B, T, H, D) in q's dtype; zeros for a query that sees no key.
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


def _seen(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    distance = queries[:, :, None] - keys[:, None, :]  # (B, T, S)
    seen = distance >= 0
    return seen & (distance < window) if window else seen


def _attend(q, k, v, seen, distance, scale, softcap, alibi_slopes, dropout) -> Tensor:
    D, share = q.shape[-1], q.shape[2] // k.shape[2]
    k, v = (_wide(x).repeat_interleave(share, dim=2) for x in (k, v))  # (B, S, H, D)
    scale = 1 / math.sqrt(D) if scale is None else scale
    scores = torch.einsum("bthd,bshd->bhts", _wide(q), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None] * distance[:, None]
    weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
    weights = weights.masked_fill(~seen[:, None], 0)  # nan where a query sees no key
    weights = torch.nn.functional.dropout(weights, dropout)
    return torch.einsum("bhts,bshd->bthd", weights, v).to(q.dtype)


def swiglu(x: Tensor) -> Tensor:
    """Gate one half of x by the SiLU of the other.

        y = silu(gate) * up,   x = [gate, up],   silu(z) = z sigmoid(z)

    x: (..., 2F), gate and up from one matrix.    Returns (..., F) in x's dtype.
    Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """
    gate, up = _wide(x).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def geglu(x: Tensor) -> Tensor:
    """Gate one half of x by the exact GELU of the other.

        y = gelu(gate) * up,   x = [gate, up],   gelu(z) = z Phi(z)

    x: (..., 2F).    Returns (..., F) in x's dtype.
    Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """
    gate, up = _wide(x).chunk(2, dim=-1)
    return (gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up).to(x.dtype)


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU, y = max(x, 0)^2, elementwise, in x's dtype.

    Source: So et al. 2021, arXiv:2109.08668, section 3.1.
    """
    return _wide(x).clamp(min=0).square().to(x.dtype)


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    *,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Mean cross-entropy, in nats, of targets under the logits x w^T.

        z = cap(x w^T);   loss = mean_n [ lse(z_n) - z_n[target_n] + z_loss lse(z_n)^2 ]

    x: (N, C) any float dtype.    w: (V, C).    targets: (N,) int64; ignore_index rows do not
    count: they may hold anything, nan too, and their gradient is 0.
    cap as in `attention`.    Returns () fp32 (fp64 for fp64 x); nan if no row counts.
    Source: z-loss: Chowdhery et al. 2022, arXiv:2204.02311, section 5.
    """
    valid = targets != ignore_index
    x, targets = x[valid], targets[valid]
    logits = cap(_wide(x) @ _wide(w).t(), softcap)  # (rows that count, V)
    # Not lse - picked: where logits are large the logarithm of the mass would be lost in lse.
    loss = -logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square()
    return loss.mean()


def cap(logits: Tensor, softcap: float) -> Tensor:
    """Soft-capped logits, softcap tanh(logits / softcap); unchanged where softcap is 0."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits
