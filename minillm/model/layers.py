"""What a decoder is built of: linear maps, norms, attention, MLP, and two kinds of block.

Shapes: B batch, T time, C width, H query heads, G key/value heads, D head width, F MLP width.
Weights may be fp32 while the stream, and with it every product, is in a narrower dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config.model import ModelConfig
from minillm.model.kv_cache import KVCache
from minillm.model.positions import alibi_slopes
from minillm.ops import Ops


class Linear(nn.Linear):
    """y = x W^T + b in x's dtype, whatever the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in).    Returns (..., out)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Head(Linear):
    """The output layer without a bias: logits in at least fp32, whatever x's dtype is.

    Rounded to bf16, a logit of 10 would be off by up to 0.03, and its probability by 3 %.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in).    Returns (..., out)."""
        w = self.weight
        narrow = x.dtype == w.dtype and w.dtype in (torch.float16, torch.bfloat16)
        if narrow and x.is_cuda and not torch.is_grad_enabled():  # without a copy of w in fp32
            z = torch.mm(x.flatten(0, -2), w.t(), out_dtype=torch.float32)
            return z.unflatten(0, x.shape[:-1])
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))


class RMSNorm(nn.Module):
    """x / rms(x) * w, see minillm.kernels.reference.norms.rms_norm."""

    def __init__(self, width: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width).    Returns the same shape."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x + residual) and x + residual, in one pass over them."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / std * w + b; Ba et al. 2016, arXiv:1607.06450, eq. 4. The bias is optional."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width).    Returns the same shape."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x + residual) and x + residual."""
        total = x + residual
        return self(total), total


def make_norm(config: ModelConfig, ops: Ops) -> nn.Module:
    """The normalisation that `config` names, over the stream's width."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_eps, ops)
    return LayerNorm(config.d_model, config.norm_eps, config.bias)


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


class MLP(nn.Module):
    """The position-wise half of a block, gated or not; gate and up are one matrix."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        wide = 2 * config.d_ff if config.gated else config.d_ff
        self.up = Linear(config.d_model, wide, bias=config.bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.bias)
        self.activation = {
            "swiglu": ops.swiglu,
            "geglu": ops.geglu,
            "relu2": ops.relu2,
            "gelu": F.gelu,
            "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
        }[config.mlp]

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C).    Returns (B, T, C)."""
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, ops)
        self.attention = Attention(config, ops)
        self.mlp_norm = make_norm(config, ops)
        self.mlp = MLP(config, ops)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation, documents, cache: KVCache | None, layer: int) -> Tensor:
        """x: (B, T, C).    Returns (B, T, C)."""
        y = self.attention(self.attention_norm(x), rotation, documents, cache, layer)
        y, x = self.mlp_norm.add(self.dropout(y), x)
        return x + self.dropout(self.mlp(y))


class SandwichBlock(nn.Module):
    """Norms before each branch and after each sum, so that the stream cannot grow with depth.

        h = n2(x + attention(n1(x))),   y = n4(h + mlp(n3(h)))

    Source: Geiping et al. 2025, arXiv:2502.05171, section 3.2.
    """

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops, self.eps = ops, config.norm_eps
        self.attention_norm = make_norm(config, ops)
        self.attention = Attention(config, ops)
        self.attention_post_norm = make_norm(config, ops)
        self.mlp_norm = make_norm(config, ops)
        self.mlp = MLP(config, ops)
        self.mlp_post_norm = make_norm(config, ops)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation, documents, cache: KVCache | None, layer: int) -> Tensor:
        """x: (B, T, C).    Returns (B, T, C)."""
        y = self.attention(self.attention_norm(x), rotation, documents, cache, layer)
        post, pre = self.attention_post_norm.weight, self.mlp_norm.weight
        y, x = self.ops.sandwich_norm(self.dropout(y), x, post, pre, self.eps)
        return self.mlp_post_norm.add(self.dropout(self.mlp(y)), x)[0]


def make_block(config: ModelConfig, ops: Ops) -> nn.Module:
    """A block as the model's style has it."""
    sandwich = config.recurrent is not None and config.recurrence_style == "huginn"
    return SandwichBlock(config, ops) if sandwich else Block(config, ops)


def matrices_of_block(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """A block's weight matrices, and the rows of the independent maps stacked in each."""
    keys = c.n_kv_head * c.d_head
    return {
        "attention.qkv.weight": (c.n_head * c.d_head, keys, keys),
        "mlp.up.weight": (c.d_ff, c.d_ff) if c.gated else (c.d_ff,),
        "attention.out.weight": (c.d_model,),
        "mlp.down.weight": (c.d_model,),
    }
