"""The two kinds of block: pre-norm and sandwich."""

from torch import Tensor, nn

from minillm.config.model import ModelConfig
from minillm.model.attention import Attention
from minillm.model.kv_cache import KVCache
from minillm.model.mlp import MLP
from minillm.model.norms import make_norm
from minillm.ops import Ops


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
