"""Blocks: pre-norm, and sandwich for recurrent models in the style of Huginn.

Shapes: B batch, T time, C width of the residual stream.
"""

from torch import Tensor, nn

from minillm.config.model import ModelConfig
from minillm.model.attention import (
    Attention,
    attention_flops,
    attention_matrices,
    attention_vectors,
)
from minillm.model.kv_cache import KVCache
from minillm.model.linear import Matrix
from minillm.model.mlp import MLPS, make_mlp
from minillm.model.norms import make_norm, norm_parameters
from minillm.ops import Ops


class Block(nn.Module):
    """Pre-norm residual block.

        h = x + attention(n1(x)),   y = h + mlp(n2(h))

    config: shape of the model
    ops: table of operations
    """

    n_norms = 2

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, ops)
        self.attention = Attention(config, ops)
        self.mlp_norm = make_norm(config, ops)
        self.mlp = make_mlp(config, ops)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation, documents, cache: KVCache | None, layer: int) -> Tensor:
        """Return the stream after the block, (B, T, C).

        x: stream before it, (B, T, C)
        rotation, documents, cache, layer: see Attention.forward
        """
        y = self.attention(self.attention_norm(x), rotation, documents, cache, layer)
        y, x = self.mlp_norm.add(self.dropout(y), x)
        return x + self.dropout(self.mlp(y))


class SandwichBlock(nn.Module):
    """Block with norms before each branch and after each sum, so that depth cannot grow the stream.

        h = n2(x + attention(n1(x))),   y = n4(h + mlp(n3(h)))

    The fused kernel of n2 and n3 needs the norm "rmsnorm", as ModelConfig checks.

    config: shape of the model
    ops: table of operations
    Source: Geiping et al. 2025, arXiv:2502.05171, section 3.2.
    """

    n_norms = 4

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops, self.eps = ops, config.norm_eps
        self.attention_norm = make_norm(config, ops)
        self.attention = Attention(config, ops)
        self.attention_post_norm = make_norm(config, ops)
        self.mlp_norm = make_norm(config, ops)
        self.mlp = make_mlp(config, ops)
        self.mlp_post_norm = make_norm(config, ops)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation, documents, cache: KVCache | None, layer: int) -> Tensor:
        """Return the stream after the block, (B, T, C).

        x: stream before it, (B, T, C)
        rotation, documents, cache, layer: see Attention.forward
        """
        y = self.attention(self.attention_norm(x), rotation, documents, cache, layer)
        post, pre = self.attention_post_norm.weight, self.mlp_norm.weight
        y, x = self.ops.sandwich_norm(self.dropout(y), x, post, pre, self.eps)
        return self.mlp_post_norm.add(self.dropout(self.mlp(y)), x)[0]


def block_class(config: ModelConfig) -> type[Block] | type[SandwichBlock]:
    """Return the class of the model's blocks."""
    sandwich = config.recurrent is not None and config.recurrence_style == "huginn"
    return SandwichBlock if sandwich else Block


def block_matrices(config: ModelConfig) -> dict[str, Matrix]:
    """Return the weight matrices of one block by parameter name.

    Those whose output is added to the stream come last. Muon keeps this order.
    """
    found = {f"attention.{name}": m for name, m in attention_matrices(config).items()}
    found |= {f"mlp.{name}": m for name, m in MLPS[config.mlp].matrices(config).items()}
    return dict(sorted(found.items(), key=lambda item: item[1].residual))


def block_vectors(config: ModelConfig) -> int:
    """Return the number of parameters of one block that are not in its matrices."""
    norms = block_class(config).n_norms * norm_parameters(config)
    return attention_vectors(config) + MLPS[config.mlp].vectors(config) + norms


def block_flops(config: ModelConfig) -> float:
    """Return FLOPs per token of one block's forward and backward pass."""
    return attention_flops(config) + MLPS[config.mlp].flops(config)
