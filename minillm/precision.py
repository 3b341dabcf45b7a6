"""The scale of the loss in fp16, whose gradients would else vanish below 6e-8.

Gradients come out multiplied by the scale and are divided by it again before the step; where they
overflow the step is left out and the scale halved. bf16 has fp32's range and needs none of this.
Source: Micikevicius et al. 2017, arXiv:1710.03740, section 3.2; growth as torch.amp's GradScaler.
"""

from dataclasses import dataclass

import torch

from minillm.errors import DivergedError

GROWTH_INTERVAL = 2000  # steps without overflow after which the scale doubles
LEAST, MOST = 2.0**-14, 2.0**24


@dataclass
class LossScale:
    """value: what the loss is multiplied by.    good: steps since the last overflow or growth."""

    value: float = 1.0
    good: int = 0

    def update(self, overflowed: bool, step: int) -> None:
        """Halve or, after long without overflow, double. Raises DivergedError at the bottom."""
        if not overflowed:
            self.good += 1
            if self.good == GROWTH_INTERVAL and self.value < MOST:
                self.value, self.good = 2 * self.value, 0
            return
        self.value, self.good = self.value / 2, 0
        if self.value < LEAST:
            raise DivergedError(
                f"step {step}: gradients overflow fp16 at any scale; the weights of the last "
                "checkpoint are good; start again with --dtype bf16 or a smaller --learning-rate"
            )


def start_scale(dtype: torch.dtype) -> LossScale | None:
    """The scale to begin with; None where the dtype needs none."""
    return LossScale(2.0**16) if dtype == torch.float16 else None
