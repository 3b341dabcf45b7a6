"""The same operations as PyTorch runs them fastest without a kernel of ours.

Same names and signatures as reference.py, which says what they mean; here only speed is of
interest. The three places where PyTorch's first answer is not its fastest are commented.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.kernels.eager_attention import attention, decode_attention
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
