"""Draw the initial weights of a model, in one of three ways."""

import math

import torch
from torch import nn

from minillm.config.model import ModelConfig
from minillm.model.size import matrices


@torch.no_grad()
def draw_weights(
    model: nn.Module, config: ModelConfig, generator: torch.Generator | None = None
) -> None:
    """Draw the weights of a model in place, in the way that `config.init` names.

    Vectors keep the values of their constructors, and biases become 0. L is the number of blocks
    that a token passes at the mean recurrence.

        gpt2     N(0, 0.02), residual outputs over sqrt(2 L) (Radford et al. 2019, section 2.3)
        zero     N(0, 1/fan_in), but residual outputs and the head 0 and the embedding N(0, 1), so
                 that each block begins as the identity
        takase   N(0, 2/(5 C)), residual outputs over sqrt(2 L), cut at three deviations (Takase et
                 al. 2023, arXiv:2312.16903; Geiping et al. 2025, arXiv:2502.05171, section 4.1)

    model: a GPT of this configuration
    config: shape of the model
    generator: source of the random numbers; default: PyTorch's own
    """
    zero, deep = config.init == "zero", math.sqrt(2 * config.effective_layers)
    inner = matrices(config)
    for name, w in model.named_parameters():
        residual = name in inner and inner[name].residual
        if name.endswith(".bias"):
            w.zero_()
        elif w.dim() != 2:
            continue
        elif name in inner and inner[name].identity:
            w.copy_(torch.eye(*w.shape))
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


def scales_embedding(config: ModelConfig) -> bool:
    """Return whether embedded tokens are multiplied by sqrt(C), as these weights expect."""
    return config.init == "takase"
