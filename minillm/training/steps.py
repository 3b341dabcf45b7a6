"""From a batch to gradients, and what is done with them before the optimisers step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minillm.config.train import ModelConfig
from minillm.data.batches import IGNORED
from minillm.distributed.strategies import Sharding
from minillm.errors import UsageError
from minillm.model.gpt import GPT
from minillm.model.size import flops_per_token


def accumulate(
    sharding: Sharding,
    tokens: Tensor,
    targets: Tensor,
    keys: Tensor,
    micro: int,
    rounds: Sequence[int | None],
    scale: float = 1.0,
) -> Tensor:
    """Gradients of the mean loss of a batch over all ranks, `micro` sequences at a time.

    tokens, targets: (B, T), this rank's.    keys: (B,) of start states.    A micro-batch weighs as
    many targets as it has. rounds: the recurrence of each group of sequences; sequence i is of
    group i modulo their number.    scale: of the loss whose gradients are taken.
    Returns the mean loss, (). Raises UsageError if no target counts.
    """
    ranks = sharding.ranks
    count = ranks.sum((targets != IGNORED).sum())
    if not count:
        raise UsageError("no target of this batch counts; take a larger --batch-size")
    some = (targets != IGNORED).any(1).cpu()
    pieces = []
    for group, r in enumerate(rounds):
        rows = (x[group :: len(rounds)].split(micro) for x in (tokens, targets, keys, some))
        for x, y, k, counts in zip(*rows, strict=True):
            if counts.any():
                pieces.append((r, x, y, k, (y != IGNORED).sum() / count))
            elif ranks.size > 1:  # all ranks make as many calls; the mean of no target would be nan
                pieces.append((r, x, y.clamp(min=0), k, 0.0))
    total = torch.zeros((), device=tokens.device)
    for i, (r, x, y, k, weight) in enumerate(pieces):
        with sharding.synced(i == len(pieces) - 1):
            loss = sharding.forward(x, y, r, k) * weight
            (loss * (scale * sharding.weight)).backward()
        total += loss.detach()
    return ranks.sum(total)


def mean_flops(shape: ModelConfig, rounds: Sequence[int | None]) -> float:
    """FLOPs a token of a step, over its groups."""
    return sum(flops_per_token(shape, r) for r in rounds) / len(rounds)


def compiled(model: GPT, whole: bool) -> Callable:
    """The model compiled: as one, or, where its core runs again and again or there are several
    ranks, block by block, so that hooks and collectives stay outside.
    """
    if whole and model.config.recurrent is None:
        return torch.compile(model)
    model.compiled = [torch.compile(block) for block in model.blocks]
    return model
