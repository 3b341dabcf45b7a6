"""Evaluate a model on held-out windows: loss in nats per token and bits per byte."""

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
    """Result of an evaluation.

    loss: mean loss, nats per token
    tokens: number of targets
    """

    loss: float
    tokens: int

    def bits_per_byte(self, split_tokens: int, split_bytes: int) -> float:
        """Return loss / ln 2 x tokens per byte of the split's raw text.

        split_tokens, split_bytes: size of the split
        """
        return self.loss / math.log(2) * split_tokens / max(1, split_bytes)


@torch.no_grad()
def evaluate(
    model: GPT,
    windows: Sequence[tuple[Tensor, Tensor]],
    batch_size: int,
    ranks: Ranks | None = None,
    poll: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Return the mean loss over all targets of `windows`, without dropout.

    Every target has the same weight. The sum is in float64.

    model: the decoder
    windows: (tokens, targets), (T,) int64 each; targets of -100 do not count
    batch_size: windows that go through the model at once
    ranks: ranks that share the windows
    poll: called before each batch, on all ranks

    Raises DivergedError, on all ranks, if the loss is not finite. It names the first such window.
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
    """Yield this rank's share of the windows in batches: numbers (B,), tokens and targets (B, T).

    Every rank gets the same number of batches. If there are too few windows, one is repeated, and
    its targets do not count.

    windows: (tokens, targets), (T,) int64 each
    ranks: ranks that share the windows
    size: windows of a batch; the last batch may be smaller
    """
    share = -(-len(windows) // ranks.size)
    for first in range(0, share, size):
        numbers = torch.arange(first, min(first + size, share)) * ranks.size + ranks.rank
        rows = [windows[min(int(n), len(windows) - 1)] for n in numbers]
        tokens, targets = (torch.stack(column) for column in zip(*rows, strict=True))
        targets = torch.where((numbers < len(windows))[:, None], targets, IGNORED)
        yield numbers, tokens, targets
