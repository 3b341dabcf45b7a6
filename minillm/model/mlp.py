"""MLPs, the position-wise half of a block, and the table of them by name.

To add one, give it a row in MLPS, add its name to MLPS in config/model.py and, if it has a gate, to
GATED; a test compares them. A new row can have another class, other matrices and other FLOPs.
Shapes: B batch, T time, C width of the residual stream, F width of the MLP.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config.model import ModelConfig
from minillm.model.linear import Linear, Matrix
from minillm.ops import Ops


class MLP(nn.Module):
    """Dense MLP: down(activation(up(x))). Gate and up projection are one matrix.

    config: shape of the model
    activation: maps (..., F), or (..., 2 F) with a gate, to (..., F)
    gated: whether the activation multiplies by a gate
    """

    def __init__(self, config: ModelConfig, activation: Callable, gated: bool) -> None:
        super().__init__()
        wide = 2 * config.d_ff if gated else config.d_ff
        self.up = Linear(config.d_model, wide, bias=config.bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, (B, T, C), for x, (B, T, C)."""
        return self.down(self.activation(self.up(x)))


@dataclass(frozen=True)
class MLPKind:
    """Row of MLPS.

    build: makes the MLP
    matrices: returns its weight matrices by parameter name
    vectors: returns the number of its other parameters
    flops: returns FLOPs per token of its forward and backward pass
    gated: whether it multiplies by a gate
    """

    build: Callable[[ModelConfig, Ops], nn.Module]
    matrices: Callable[[ModelConfig], dict[str, Matrix]]
    vectors: Callable[[ModelConfig], int]
    flops: Callable[[ModelConfig], float]
    gated: bool


def _dense(activation: Callable[[Ops], Callable], gated: bool = False) -> MLPKind:
    """Return the row of an MLP whose every parameter is used for every token."""
    maps = 2 if gated else 1

    def matrices(c: ModelConfig) -> dict[str, Matrix]:
        return {
            "up.weight": Matrix((c.d_ff,) * maps, c.d_model),
            "down.weight": Matrix((c.d_model,), c.d_ff, residual=True),
        }

    return MLPKind(
        build=lambda c, ops: MLP(c, activation(ops), gated),
        matrices=matrices,
        vectors=lambda c: maps * c.d_ff + c.d_model if c.bias else 0,
        flops=lambda c: 6 * sum(m.elements for m in matrices(c).values()),
        gated=gated,
    )


MLPS = {
    "swiglu": _dense(lambda ops: ops.swiglu, gated=True),
    "geglu": _dense(lambda ops: ops.geglu, gated=True),
    "gelu": _dense(lambda ops: F.gelu),
    "gelu-tanh": _dense(lambda ops: partial(F.gelu, approximate="tanh")),
    "relu2": _dense(lambda ops: ops.relu2),
}


def make_mlp(config: ModelConfig, ops: Ops) -> nn.Module:
    """Return a new MLP of the kind that the configuration names.

    config: shape of the model
    ops: table of operations
    """
    return MLPS[config.mlp].build(config, ops)
