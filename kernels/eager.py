"""The same operations as PyTorch runs them fastest without a kernel of ours.

Same names and signatures as reference.py, which says what they mean; here only speed is of
interest. The three places where PyTorch's first answer is not its fastest are commented.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.kernels import reference
from minillm.kernels.eager_loss import linear_cross_entropy
from minillm.kernels.eager_optim import adamw, newton_schulz
from minillm.kernels.eager_sampling import uniform
from minillm.kernels.reference import sample

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


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    """As reference.rms_norm."""
    return F.rms_norm(x, (x.shape[-1],), w.to(x.dtype), eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, w: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """As reference.add_rms_norm."""
    s = x + residual
    return rms_norm(s, w, eps), s


def sandwich_norm(
    x: Tensor, residual: Tensor, w_post: Tensor, w_pre: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """As reference.sandwich_norm."""
    h = rms_norm(x + residual, w_post, eps)
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
    """As reference.rope."""
    if q_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    # (..., T, 1, D/2); in q's dtype, as fp32 tables would make every product fp32.
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
    """As reference.rope_cache; one position for all rows is a slice, not an index."""
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
    """As reference.attention, through scaled_dot_product_attention unless there is a soft-cap."""
    T = q.shape[1]
    if softcap:
        return reference.attention(
            q, k, v, scale=scale, window=window, documents=documents, softcap=softcap,
            alibi_slopes=alibi_slopes, dropout=dropout,
        )  # fmt: skip
    window = window if window < T else 0
    dtype = q.dtype
    if q.device.type == "cpu" and dtype == torch.bfloat16 and torch.is_grad_enabled():
        # The backward of bf16 SDPA on a CPU is five times slower than that of fp32; three plain
        # products in bf16, a few sequences at a time, are twice as fast again where T^2 fits.
        plain = documents is None and alibi_slopes is None and not dropout
        if plain and T <= LONGEST_PLAIN and q.shape[2] == k.shape[2]:
            return _plain_attention(q, k, v, scale, window)
        q, k, v = q.float(), k.float(), v.float()
    mask = None
    if window or documents is not None or alibi_slopes is not None:
        positions = torch.arange(T, device=q.device)
        mask = _mask(positions, positions, window, alibi_slopes, q.dtype)  # (1 or H, T, S)
        if documents is not None:
            same = documents[:, None, :, None] == documents[:, None, None, :]  # (B, 1, T, S)
            mask = mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, -torch.inf)
    return _sdpa(q, k, v, mask, mask is None, scale, dropout).to(dtype)


LONGEST_PLAIN = 1024
PLAIN_SCORES = 1 << 20  # scores alive at a time: what a CPU's caches hold


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    """softmax(q k^T + mask) v with every factor in q's dtype, some rows of the batch at a time."""
    T, H, D = q.shape[1:]
    positions = torch.arange(T, device=q.device)
    unseen = ~_mask(positions, positions, window, None, q.dtype)
    mask = torch.zeros(T, T, dtype=q.dtype, device=q.device).masked_fill_(unseen, -torch.inf)
    q = q * (D**-0.5 if scale is None else scale)
    rows = max(1, PLAIN_SCORES // (H * T * T))
    parts = zip(*(x.transpose(1, 2).split(rows) for x in (q, k, v)), strict=True)  # (rows, H, T, D)
    y = [torch.matmul(a, b.mT).add_(mask).softmax(-1) @ c for a, b, c in parts]
    return torch.cat(y).transpose(1, 2)  # (B, T, H, D)


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
    """As reference.decode_attention."""
    T, S = q.shape[1], k.shape[1]
    if softcap or (lengths is not None and alibi_slopes is not None):
        return reference.decode_attention(
            q, k, v, lengths, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes
        )
    if lengths is None and T == 1 and alibi_slopes is None:
        # One query at the end of a full cache sees its window's keys and nothing else: no mask.
        keys = slice(max(0, S - window), S) if window else slice(None)
        return _sdpa(q, k[:, keys], v[:, keys], None, False, scale)
    positions = torch.arange(S, device=q.device)
    if lengths is None:
        mask = _mask(positions[S - T :], positions, window, alibi_slopes, q.dtype)
    else:
        queries = lengths[:, None] - T + torch.arange(T, device=q.device)  # (B, T)
        mask = _mask(queries, positions, window, None, q.dtype)[:, None]  # (B, 1, T, S)
    return _sdpa(q, k, v, mask, False, scale)


def _mask(
    queries: Tensor, keys: Tensor, window: int, alibi_slopes: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(..., T, S): True where seen; with ALiBi (H, T, S), what is added to the scores."""
    distance = queries[..., None] - keys
    seen = distance >= 0
    if window:
        seen = seen & (distance < window)
    if alibi_slopes is None:
        return seen
    bias = -alibi_slopes[:, None, None] * distance
    return bias.masked_fill(~seen, -torch.inf).to(dtype)


def _sdpa(q, k, v, mask, causal, scale, dropout=0.0) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
        dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped,
    )  # fmt: skip
    return y.transpose(1, 2)  # (B, T, H, D)


def swiglu(x: Tensor) -> Tensor:
    """As reference.swiglu."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(x: Tensor) -> Tensor:
    """As reference.geglu."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate) * up


def relu2(x: Tensor) -> Tensor:
    """As reference.relu2."""
    return F.relu(x).square()
