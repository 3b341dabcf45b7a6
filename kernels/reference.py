"""All the maths of the house on one page: pure PyTorch, slow, in at least fp32.

Every fast path (eager.py, the Triton kernels) has a function of the same name and signature and
answers to the one here. A change in this file changes meaning; a change elsewhere only speed.

Letters: B batch, T queries, S keys, C model width, H query heads, G key/value heads, D head width,
F MLP width, V vocabulary, N rows.
"""

import math

import torch
from torch import Tensor


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
    documents: (B, T) integers; a query sees only keys of its own document.
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
    Query t of row b stands at position lengths[b] - T + t.
    Returns (B, T, H, D) in q's dtype.
    """
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    if lengths is None:
        lengths = torch.full((B,), S, device=q.device)
    queries = lengths[:, None] - T + torch.arange(T, device=q.device)  # (B, T)
    keys = torch.arange(S, device=q.device).expand(B, S)
    seen = _seen(queries, keys, window)
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

    x: (N, C) any float dtype.    w: (V, C).    targets: (N,) int64; ignore_index rows do not count.
    cap as in `attention`.    Returns () fp32 (fp64 for fp64 x); nan if no row counts.
    Source: z-loss: Chowdhery et al. 2022, arXiv:2204.02311, section 5.
    """
    logits = cap(_wide(x) @ _wide(w).t(), softcap)  # (N, V)
    valid = targets != ignore_index
    lse = logits.logsumexp(-1)
    picked = logits.gather(-1, targets.where(valid, 0)[:, None]).squeeze(-1)
    loss = lse - picked + z_loss * lse.square()
    return loss[valid].mean()


def cap(logits: Tensor, softcap: float) -> Tensor:
    """Soft-capped logits, softcap tanh(logits / softcap); unchanged where softcap is 0."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of each matrix towards 1 (about 0.7 to 1.2 after five steps).

        X <- G / (|G|_F + 1e-7);   repeat: A = X X^T;  X <- a X + (b A + c A A) X

    g: (..., M, N), any float dtype.    Returns (..., M, N) in g's dtype.
    Source: Jordan et al. 2024, "Muon", coefficients (3.4445, -4.7750, 2.0315).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = _wide(g)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return (x.mT if tall else x).to(g.dtype)


def sample(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Draw one token a row by inverse transform, filters in the order of the arguments.

        p = softmax(logits / temperature) -> keep the top_k largest -> keep the smallest set of
        largest with mass >= top_p -> keep p >= min_p max(p);   token = min {t: cdf(t) > u cdf(V)}

    logits: (B, V).    uniform: (B,) in [0, 1).    temperature 0 takes the (first) largest logit.
    top_k 0, top_p 1, min_p 0 keep all; each filter renormalises; ties at the border are kept.
    Returns (B,) int64.
    Source: top-p: Holtzman et al. 2019, arXiv:1904.09751; min-p: Nguyen et al. 2024,
    arXiv:2407.01082.
    """
    logits = _wide(logits)
    if temperature == 0:
        return logits.argmax(-1)
    # Below 1e-30 the temperature would be 0 in fp32, and the largest logit's 0 / 0 not a number.
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
