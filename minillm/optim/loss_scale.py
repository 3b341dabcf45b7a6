"""The scale of the loss in fp16, whose gradients would else vanish below 6e-8.

Gradients come out multiplied by the scale and are divided by it again before the step; where they
overflow the step is left out and the scale halved. bf16 has fp32's range and needs none of this.
Source: Micikevicius et al. 2017, arXiv:1710.03740, section 3.2; growth as torch.amp's GradScaler.
"""

import math
from dataclasses import dataclass

import torch

GROWTH_INTERVAL = 2000  # steps without overflow after which the scale doubles
LEAST, MOST = 1.0, 2.0**24  # gradients that overflow unscaled are no matter of the scale


@dataclass
class LossScale:
    """value: what the loss is multiplied by.    good: steps since the last overflow or growth."""

    value: float = 1.0
    good: int = 0

    def is_to_blame(self, loss: float, norm: float) -> bool:
        """Whether it can be the scale that made the gradients overflow: then it is halved."""
        blamed = math.isfinite(loss) and not math.isfinite(norm) and self.value > LEAST
        if blamed:
            self.value, self.good = self.value / 2, 0
        return blamed

    def went_well(self) -> None:
        """A step was taken; after many the scale is doubled."""
        self.good += 1
        if self.good == GROWTH_INTERVAL and self.value < MOST:
            self.value, self.good = 2 * self.value, 0


def start_scale(dtype: torch.dtype) -> LossScale | None:
    """The scale to begin with; None where the dtype needs none."""
    return LossScale(2.0**16) if dtype == torch.float16 else None
