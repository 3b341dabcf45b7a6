"""Loss of a model over held-out windows, in nats a token and bits a byte."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.model import GPT
from minillm.recurrence import state_keys


@dataclass(frozen=True)
class Evaluation:
    """loss: nats a token.    tokens: how many were predicted."""

    loss: float
    tokens: int

    def bits_per_byte(self, split_tokens: int, split_bytes: int) -> float:
        """loss / ln 2 x tokens a byte of the split's raw text."""
        return self.loss / math.log(2) * split_tokens / max(1, split_bytes)


@torch.no_grad()
def evaluate(model: GPT, windows: Iterable[tuple[Tensor, Tensor]], batch_size: int) -> Evaluation:
    """Mean loss over all targets of `windows`, `batch_size` windows at a time, without dropout.

    windows: (tokens, targets), (T,) int64 each; targets of -100 do not count.
    The mean weighs every token equally; the sum is taken in float64.
    """
    device = model.head.weight.device
    training = model.training
    model.eval()
    total, count, seen = 0.0, 0, 0
    for tokens, targets in batched(windows, batch_size):
        n = int((targets != -100).sum())
        if not n:
            continue
        samples = torch.arange(seen, seen + len(tokens), device=device)
        keys = state_keys(0, samples)
        total += float(model(tokens.to(device), targets.to(device), None, keys)) * n
        seen += len(tokens)
        count += n
    model.train(training)
    return Evaluation(total / max(1, count), count)


def batched(windows: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The windows, `size` at a time, (size, T) each; the last may be fewer."""
    rows: list[tuple[Tensor, Tensor]] = []
    for row in windows:
        rows.append(row)
        if len(rows) == size:
            yield tuple(torch.stack(column) for column in zip(*rows, strict=True))
            rows = []
    if rows:
        yield tuple(torch.stack(column) for column in zip(*rows, strict=True))
