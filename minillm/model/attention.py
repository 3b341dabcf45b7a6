"""Causal self-attention, with and without a KV cache.

Shapes: B batch, T time, S length of the cache, C width of the residual stream, H query heads,
G key/value heads, D head width, P rows of the rotary tables.
"""

import torch
from torch import Tensor, nn

from minillm.config.model import ModelConfig
from minillm.model.kv_cache import KVCache
from minillm.model.linear import Linear, Matrix
from minillm.model.positions import POSITIONS
from minillm.ops import Ops


class Attention(nn.Module):
    """Causal self-attention with one matrix for queries, keys and values.

    config: shape of the model
    ops: table of operations
    """

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
        slopes = POSITIONS[config.position].slopes(config)
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        documents: Tensor | None,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        """Return the output, (B, T, C).

        x: normalised residual stream, (B, T, C)
        rotation: cosines and sines, (T, D/2) or (P, D/2) each, or None
        documents: number of each token's document, (B, T) int64, or None
        cache: keys and values of earlier tokens, to which those of x are added, or None
        layer: slot of the cache for this block
        """
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
        if decoding:
            y = self._decode(q, k, v, rotation, cache, layer, options)
        elif cache is not None:
            cache.write(layer, k, v)
            y = ops.attention(q, k, v, **options)
        else:
            dropout = c.dropout if self.training else 0.0
            y = ops.attention(q, k, v, documents=documents, dropout=dropout, **options)
        return self.out(y.reshape(B, T, c.n_head * c.d_head))

    def _decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        cache: KVCache,
        layer: int,
        options: dict,
    ) -> Tensor:
        """Return attention, (B, T, H, D), of new tokens to those of the cache and themselves."""
        T = q.shape[1]
        if rotation is None:
            k, v = cache.write(layer, k, v)  # (B, S, G, D)
        else:
            past = cache.entries(layer, T)  # (B, S, G, D) each
            norms = self.q_norm, self.k_norm, self.config.norm_eps
            q = self.ops.rope_cache(q, k, v, *rotation, *past, cache.next_positions(), *norms)
            k, v = past
        ends = None if cache.equal_lengths() else cache.next_positions() + T
        return self.ops.decode_attention(q, k, v, ends, **options)


def attention_matrices(c: ModelConfig) -> dict[str, Matrix]:
    """Return the weight matrices by parameter name."""
    queries, keys = c.n_head * c.d_head, c.n_kv_head * c.d_head
    return {
        "qkv.weight": Matrix((queries, keys, keys), c.d_model),
        "out.weight": Matrix((c.d_model,), queries, residual=True),
    }


def attention_vectors(c: ModelConfig) -> int:
    """Return the number of parameters that are not in the matrices."""
    norms = 2 * c.d_head if c.qk_norm else 0
    rotated = (c.n_head + c.n_kv_head) * c.d_head if c.qk_bias else 0
    biases = (c.n_head + 2 * c.n_kv_head) * c.d_head + c.d_model if c.bias else 0
    return norms + rotated + biases


def attention_flops(c: ModelConfig) -> float:
    """Return FLOPs per token of the forward and backward pass.

    The scores and the sum of values take 12 H D T, where T counts all positions of the context or
    window.
    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    span = min(c.seq_len, c.window or c.seq_len)
    products = 6 * sum(m.elements for m in attention_matrices(c).values())
    return products + 12 * c.n_head * c.d_head * span
