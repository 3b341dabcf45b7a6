"""Loss of a model over held-out windows, in nats a token and bits a byte."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.data.batches import IGNORED
from minillm.distributed.ranks import Ranks
from minillm.errors import DivergedError
from minillm.model.gpt import GPT
from minillm.model.recurrence import state_keys


@dataclass(frozen=True)
class Evaluation:
    """loss: nats a token.    tokens: how many were predicted."""

    loss: float
    tokens: int

    def bits_per_byte(self, split_tokens: int, split_bytes: int) -> float:
        """loss / ln 2 x tokens a byte of the split's raw text."""
        return self.loss / math.log(2) * split_tokens / max(1, split_bytes)


@torch.no_grad()
def evaluate(
    model: GPT,
    windows: Sequence[tuple[Tensor, Tensor]],
    batch_size: int,
    ranks: Ranks | None = None,
    poll: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Mean loss over all targets of `windows`, `batch_size` windows at a time, without dropout.

    windows: (tokens, targets), (T,) int64 each; targets of -100 do not count.    ranks: share them.
    poll: called before each batch, on all ranks.
    The mean weighs every token equally; the sum is taken in float64.
    Raises DivergedError, on all ranks, that names the first window whose loss is not finite.
    """
    ranks = Ranks() if ranks is None else ranks
    device = model.head.weight.device
    training = model.training
    model.eval()
    total, count = torch.zeros(2, dtype=torch.float64, device=ranks.sums_on)
    bad = len(windows)
    for samples, tokens, targets in batched(windows, batch_size, ranks):
        poll()
        n = int((targets != IGNORED).sum())
        if not n and ranks.size == 1:
            continue
        keys = state_keys(0, samples.to(device))
        loss = model(tokens.to(device), targets.to(device), None, keys)
        if n:
            total += float(loss) * n
            count += n
            bad = bad if loss.isfinite() else min(bad, int(samples[0]))
    model.train(training)
    count, mean = int(ranks.sum(count)), float(ranks.sum(total))
    mean /= max(1, count)
    if not math.isfinite(mean):  # the same on all ranks, as the sums are
        raise DivergedError(
            f"the loss of the validation text is {mean}, first in the batch of window "
            f"{int(ranks.minimum(bad))} of {len(windows)}: the model's numbers have overflowed"
        )
    return Evaluation(mean, count)


def batched(
    windows: Sequence[tuple[Tensor, Tensor]], size: int, ranks: Ranks
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's share of the windows, `size` at a time: their numbers, (size,), tokens and
    targets, (size, T); the last may be fewer.

    All ranks have as many: where the windows do not suffice, one is repeated and does not count.
    """
    share = -(-len(windows) // ranks.size)
    for first in range(0, share, size):
        numbers = torch.arange(first, min(first + size, share)) * ranks.size + ranks.rank
        rows = [windows[min(int(n), len(windows) - 1)] for n in numbers]
        tokens, targets = (torch.stack(column) for column in zip(*rows, strict=True))
        targets = torch.where((numbers < len(windows))[:, None], targets, IGNORED)
        yield numbers, tokens, targets
