"""Loss scaling for fp16, in which gradients below 6e-8 would become zero.

The loss is multiplied by the scale, and so are its gradients, which are divided by it before the
step. Where they overflow, the step is skipped and the scale halved. bf16 has the range of fp32 and
needs no scale.

Source: Micikevicius et al. 2017, arXiv:1710.03740, section 3.2; it grows as torch.amp's GradScaler.
"""

import math
from dataclasses import dataclass

import torch

GROWTH_INTERVAL = 2000  # steps without overflow after which the scale doubles
LEAST, MOST = 1.0, 2.0**24  # at LEAST an overflow has another cause than the scale


@dataclass
class LossScale:
    """Factor of the loss, which is halved after an overflow and doubled after good steps.

    value: the factor
    good: number of steps since the last overflow or growth
    """

    value: float = 1.0
    good: int = 0

    def is_to_blame(self, loss: float, norm: float) -> bool:
        """Return whether the scale may have made the gradients overflow. If so, halve it.

        loss: loss of the step, without the scale
        norm: total norm of the gradients
        """
        blamed = math.isfinite(loss) and not math.isfinite(norm) and self.value > LEAST
        if blamed:
            self.value, self.good = self.value / 2, 0
        return blamed

    def went_well(self) -> None:
        """Count a step that was taken. Double the scale after GROWTH_INTERVAL of them."""
        self.good += 1
        if self.good == GROWTH_INTERVAL and self.value < MOST:
            self.value, self.good = 2 * self.value, 0


def start_scale(dtype: torch.dtype) -> LossScale | None:
    """Return the initial scale, or None if the dtype needs none."""
    return LossScale(2.0**16) if dtype == torch.float16 else None
