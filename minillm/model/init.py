"""Weights before the first step: three ways to draw them."""

import math

import torch
from torch import nn

from minillm.config.model import ModelConfig


@torch.no_grad()
def draw_weights(
    model: nn.Module, config: ModelConfig, generator: torch.Generator | None = None
) -> None:
    """Set the model's weights by `config.init`; vectors keep theirs, biases become 0.

    gpt2: N(0, 0.02), residual outputs over sqrt(2L) (Radford et al. 2019, section 2.3).
    zero: N(0, 1/fan_in), but residual outputs and the head at 0 and the embedding N(0, 1):
    each block begins as the identity.
    takase: N(0, 2/(5C)), residual outputs over sqrt(2L), L the layers passed at the mean
    recurrence, all cut at three deviations (Takase et al. 2023, arXiv:2312.16903; Geiping et
    al. 2025, arXiv:2502.05171, section 4.1).
    """
    zero, deep = config.init == "zero", math.sqrt(2 * config.effective_layers)
    for name, w in model.named_parameters():
        residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        if name.endswith(".bias"):
            w.zero_()
        elif w.dim() != 2:
            continue
        elif name == "injection.text.weight" and config.injection == "diagonal":
            w.copy_(torch.eye(config.d_model))
        elif config.init == "takase":
            std = math.sqrt(2 / (5 * config.d_model)) / (deep if residual else 1)
            nn.init.trunc_normal_(w, 0.0, std, -3 * std, 3 * std, generator=generator)
        else:
            if zero and (residual or name == "head.weight"):
                std = 0.0
            elif zero:
                std = 1.0 if name == "embed.weight" else w.shape[1] ** -0.5
            else:
                std = 0.02 / deep if residual else 0.02
            w.normal_(0.0, std, generator=generator)
