"""The exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Average:
    """Exponential moving average of the weights in fp32: a <- a + (1 - d) (w - a).

    At step n, d is min(decay, (1 + n) / (10 + n)), so that the initial weights soon count little.

    parameters: the weights to average, by name
    decay: d after many steps
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.weights = {n: p.detach().float().clone() for n, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in self.parameters.items():
            self.weights[name].lerp_(p.float(), 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the average into the model inside the `with`, and restore its weights at the end."""
        own = {n: p.detach().clone() for n, p in self.parameters.items()}
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(own[name])
