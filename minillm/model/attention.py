"""Causal self-attention, with and without a KV cache."""

import torch
from torch import Tensor, nn

from minillm.config.model import ModelConfig
from minillm.model.kv_cache import KVCache
from minillm.model.linear import Linear
from minillm.model.positions import alibi_slopes
from minillm.ops import Ops


class Attention(nn.Module):
    """Causal self-attention with one matrix for queries, keys and values."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        H, G, D = config.n_head, config.n_kv_head, config.d_head
        self.qkv = Linear(config.d_model, (H + 2 * G) * D, bias=config.bias)
        self.out = Linear(H * D, config.d_model, bias=config.bias)
        self.q_bias = nn.Parameter(torch.zeros(H * D)) if config.qk_bias else None
        self.k_bias = nn.Parameter(torch.zeros(G * D)) if config.qk_bias else None
        self.q_norm = nn.Parameter(torch.ones(D)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(D)) if config.qk_norm else None
        slopes = alibi_slopes(H) if config.position == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        documents: Tensor | None,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        """x: (B, T, C).    Returns (B, T, C)."""
        c, ops = self.config, self.ops
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, c.n_head + 2 * c.n_kv_head, c.d_head)
        q, k, v = heads.split((c.n_head, c.n_kv_head, c.n_kv_head), dim=2)  # (B, T, H|G|G, D)
        if c.qk_bias:
            q = q + self.q_bias.view(c.n_head, c.d_head).to(q.dtype)
            k = k + self.k_bias.view(c.n_kv_head, c.d_head).to(k.dtype)
        decoding = cache is not None and max(cache.lengths) > 0
        if rotation is not None and not decoding:
            q, k = ops.rope(q, k, *rotation, self.q_norm, self.k_norm, c.norm_eps)
        elif rotation is None and c.qk_norm:
            q = ops.rms_norm(q, self.q_norm, c.norm_eps)
            k = ops.rms_norm(k, self.k_norm, c.norm_eps)
        options = {"window": c.window, "alibi_slopes": self.slopes}
        if cache is None:
            dropout = c.dropout if self.training else 0.0
            y = ops.attention(q, k, v, documents=documents, dropout=dropout, **options)
        elif not decoding:
            cache.write(layer, k, v)
            y = ops.attention(q, k, v, **options)
        else:
            if rotation is None:
                k, v = cache.write(layer, k, v)  # (B, S, G, D)
            else:
                past = cache.room(layer, T)  # (B, S, G, D) each
                q = ops.rope_cache(
                    q, k, v, *rotation, *past, cache.starts(), self.q_norm, self.k_norm, c.norm_eps
                )
                k, v = past
            ends = None if cache.uniform() else cache.starts() + T
            y = ops.decode_attention(q, k, v, ends, **options)
        return self.out(y.reshape(B, T, c.n_head * c.d_head))
