"""The position-wise half of a block."""

import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config.model import ModelConfig
from minillm.model.linear import Linear
from minillm.ops import Ops


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
