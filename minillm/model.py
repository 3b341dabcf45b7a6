"""The decoder. It knows no ranks, no files and no Triton; `ops` holds its hot operations.

Shapes: B batch, T time, C width, H query heads, G key/value heads, D head width, F MLP width,
V vocabulary. Layout is (B, T, H, D) throughout. Weights may be fp32 while the stream, and with it
every product, is in `dtype`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.cache import KVCache
from minillm.config import ModelConfig
from minillm.ops import Ops
from minillm.positions import alibi_slopes, rope_tables, sinusoidal_table


class Linear(nn.Linear):
    """y = x W^T + b in x's dtype, whatever the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in).    Returns (..., out)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / rms(x) * w, see minillm.kernels.reference.rms_norm."""

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


class GPT(nn.Module):
    """A decoder-only language model.

    config: its shape; vocab_size must be set.    ops: see minillm.ops.select.
    dtype: of the stream; the weights stay in fp32.    generator: draws the start weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("config.vocab_size is None; a model needs it")
        if config.document_mask and config.bos_id is None:
            raise ValueError("document_mask needs bos_id, the token each document begins with")
        self.config, self.ops, self.dtype = config, ops, dtype
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.position = nn.Embedding(config.seq_len, config.d_model)
        if config.position == "sinusoidal":
            table = sinusoidal_table(config.seq_len, config.d_model)
            self.register_buffer("sinusoids", table, persistent=False)
        if config.position == "rope":
            cos, sin = rope_tables(config.seq_len, config.d_head, config.rope_base)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(config.n_layer))
        self.norm = make_norm(config, ops)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.dropout = nn.Dropout(config.dropout)
        self._start_weights(generator)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or with targets the mean loss.

        tokens: (B, T) int64, T <= seq_len.    targets: (B, T) int64, -100 where none counts.
        Returns (B, T, V) in `dtype`, or () fp32 in nats a token.
        """
        x = self.trunk(tokens)
        if targets is None:
            return self.logits(x)
        return self.ops.linear_cross_entropy(
            x.flatten(0, 1),
            self.head.weight,
            targets.flatten(),
            softcap=self.config.logit_softcap,
        )

    def trunk(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Everything up to the head: (B, T) tokens -> (B, T, C).

        With a cache the tokens follow those it holds; their keys and values are added to it.
        Raises ValueError if the positions reach beyond seq_len.
        """
        T, held = tokens.shape[1], max(cache.lengths) if cache else 0
        if held + T > self.config.seq_len:
            raise ValueError(f"{held + T} positions; seq_len is {self.config.seq_len}")
        ragged = cache is not None and not cache.uniform()
        where = cache.positions(T) if ragged else slice(held, held + T)
        x = self.embed(tokens)  # (B, T, C)
        if self.config.position == "learned":
            x = x + self.position.weight[where]
        elif self.config.position == "sinusoidal":
            x = x * math.sqrt(self.config.d_model) + self.sinusoids[where]
        x = self.dropout(x).to(self.dtype)
        rotation = None
        if self.config.position == "rope":
            # While decoding the rows of the tables are taken where they are needed.
            rows = slice(None) if held else where
            rotation = self.cos[rows], self.sin[rows]  # (P or T, D/2)
        documents = None
        if self.config.document_mask and cache is None:
            documents = (tokens == self.config.bos_id).cumsum(1)  # (B, T)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, documents, cache, layer)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V), soft-capped if the config says so."""
        z = self.head(x)
        softcap = self.config.logit_softcap
        return softcap * torch.tanh(z / softcap) if softcap else z

    def make_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache for `batch` rows of `capacity` (default seq_len) positions."""
        c = self.config
        return KVCache(
            c.n_layer, batch, capacity or c.seq_len, c.n_kv_head, c.d_head, self.dtype,
            self.head.weight.device,
        )  # fmt: skip

    def matrices(self) -> dict[str, tuple[int, ...]]:
        """The blocks' weight matrices, and the rows of the independent maps stacked in each."""
        c = self.config
        heads = (c.n_head * c.d_head, c.n_kv_head * c.d_head, c.n_kv_head * c.d_head)
        up = (c.d_ff, c.d_ff) if c.gated else (c.d_ff,)
        rows = {"attention.qkv": heads, "mlp.up": up}
        whole = {"attention.out": (c.d_model,), "mlp.down": (c.d_model,)}
        return {
            f"blocks.{i}.{name}.weight": parts
            for i in range(c.n_layer)
            for name, parts in {**rows, **whole}.items()
        }

    @torch.no_grad()
    def _start_weights(self, generator: torch.Generator | None) -> None:
        """gpt2: N(0, 0.02), residual outputs over sqrt(2L) (Radford et al. 2019, section 2.3).

        zero: N(0, 1/fan_in), but residual outputs and the head at 0 and the embedding N(0, 1):
        each block begins as the identity.
        """
        zero = self.config.init == "zero"
        for name, w in self.named_parameters():
            if name.endswith(".bias"):
                w.zero_()
            elif w.dim() == 2:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                if zero and (residual or name == "head.weight"):
                    std = 0.0
                elif zero:
                    std = 1.0 if name == "embed.weight" else w.shape[1] ** -0.5
                else:
                    std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                w.normal_(0.0, std, generator=generator)
