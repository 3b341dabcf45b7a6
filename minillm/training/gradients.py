"""Compute the gradients of a batch from micro-batches, for any loss."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minillm.data.batches import IGNORED
from minillm.distributed.strategies import Sharding
from minillm.errors import UsageError, parameter

# loss(forward, tokens, targets, recurrence, keys) -> (), see `next_token_loss`.
Loss = Callable[[Callable, Tensor, Tensor, int | None, Tensor], Tensor]


def next_token_loss(
    forward: Callable, tokens: Tensor, targets: Tensor, recurrence: int | None, keys: Tensor
) -> Tensor:
    """Return the mean loss of a micro-batch over the targets that count, (), nats per token.

    forward: the model on its ranks. A loss calls it once.
    tokens, targets: (B, T) int64; targets of -100 do not count
    recurrence: iterations of the core; None without recurrent depth
    keys: (B,) keys of the start states
    """
    return forward(tokens, targets, recurrence, keys)


def accumulate(
    sharding: Sharding,
    tokens: Tensor,
    targets: Tensor,
    keys: Tensor,
    micro_batch: int,
    recurrences: Sequence[int | None],
    scale: float = 1.0,
    loss: Loss = next_token_loss,
) -> Tensor:
    """Compute the gradients of the mean loss of a batch over all ranks; return this loss, ().

    A micro-batch weighs as much as the number of its targets that count.

    sharding: the model, laid out over the ranks
    tokens, targets: (B, T) int64, this rank's
    keys: (B,) keys of the start states
    micro_batch: sequences that go through the model at once
    recurrences: recurrence of each group of sequences; sequence i is in group i modulo their number
    scale: factor of the loss whose gradients are computed
    loss: loss of one micro-batch, see `next_token_loss`

    Raises UsageError if no target counts.
    """
    ranks = sharding.ranks
    count = ranks.sum((targets != IGNORED).sum())
    if not count:
        raise UsageError(f"no target of this batch counts; take a larger {parameter('batch_size')}")
    some = (targets != IGNORED).any(1).cpu()
    parts = []
    for group, r in enumerate(recurrences):
        rows = (
            x[group :: len(recurrences)].split(micro_batch) for x in (tokens, targets, keys, some)
        )
        for x, y, k, counts in zip(*rows, strict=True):
            if counts.any():
                parts.append((r, x, y, k, (y != IGNORED).sum() / count))
            elif ranks.size > 1:
                # All ranks make the same number of calls; the mean over no target would be nan.
                parts.append((r, x, y.clamp(min=0), k, 0.0))
    total = torch.zeros((), device=tokens.device)
    for i, (r, x, y, k, weight) in enumerate(parts):
        with sharding.synced(i == len(parts) - 1):
            part = loss(sharding.forward, x, y, r, k) * weight
            (part * (scale * sharding.weight)).backward()
        total += part.detach()
    return ranks.sum(total)
