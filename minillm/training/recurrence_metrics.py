"""Evaluate a model with recurrent depth at several recurrences, and detect failing recurrence.

The loss alone does not show these failures: the states of all tokens become equal (collapsed), the
iterations change nothing (ignored), or the state grows without limit (growing).
Source: Geiping et al. 2025, arXiv:2502.05171, section 4.3.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minillm.distributed.ranks import Ranks
from minillm.model.gpt import GPT
from minillm.model.recurrence import state_keys
from minillm.training.evaluate import batched

COLLAPSED = 0.9  # correlation of tokens above which the recurrence has collapsed
LEAST_GAIN = 0.02  # nats; the core is ignored if the mean recurrence gains less over recurrence 1
GROWING = 1.5  # growth of the state from the mean recurrence to four times it


def evaluated_recurrences(mean: int) -> list[int]:
    """Return the powers of two below the mean, the mean, twice the mean and four times the mean."""
    powers = [1 << i for i in range(mean.bit_length()) if 1 << i < mean]
    return [*powers, mean, 2 * mean, 4 * mean]


@torch.no_grad()
def measure(
    model: GPT,
    windows: Sequence[tuple[Tensor, Tensor]],
    batch_size: int,
    ranks: Ranks | None = None,
    poll: Callable[[], None] = lambda: None,
) -> dict:
    """Return the part of a row of metrics.jsonl about the recurrence.

    val_loss_at_r: {"1": nats per token, ...}
    token_correlation: correlation of the states at the mean recurrence, 0 to 1, see `correlation`
    state_growth: norm of the state at four times the mean, divided by that at the mean

    model: the decoder
    ranks: ranks that share the windows
    windows: (tokens, targets), (T,) int64 each; the ranks share them
    batch_size: windows that go through the model at once
    poll: called before each batch, on all ranks
    """
    mean, device = model.config.mean_recurrence, model.head.weight.device
    at, training = evaluated_recurrences(mean), model.training
    ranks = Ranks() if ranks is None else ranks
    model.eval()
    losses, norms = torch.zeros(2, len(at), dtype=torch.float64, device=ranks.sums_on)
    count, similar, batches = torch.zeros(3, dtype=torch.float64, device=ranks.sums_on)
    for samples, tokens, targets in batched(windows, batch_size, ranks):
        poll()
        n = int((targets >= 0).sum())
        if not n and ranks.size == 1:
            continue
        readings = model.readings(tokens.to(device), at, state_keys(0, samples.to(device)))
        for i, (r, x, s) in enumerate(readings):
            if n:
                losses[i] += float(model.loss(x, targets.to(device))) * n
                norms[i] += float(s.float().norm(dim=-1).mean())
            if n and r == mean:
                similar += correlation(s)
        count, batches = count + n, batches + bool(n)
    model.train(training)
    for x in (losses, norms, count, similar, batches):
        ranks.sum(x)
    if not count:
        return {}
    growth = norms[at.index(4 * mean)] / norms[at.index(mean)].clamp(min=1e-30)
    return {
        "val_loss_at_r": {str(r): float(x) for r, x in zip(at, losses / count, strict=True)},
        "token_correlation": float(similar / batches),
        "state_growth": float(growth),
    }


def correlation(s: Tensor) -> float:
    """Return how much the tokens of a sequence point in one direction.

    This is the mean of the off-diagonal entries of the Gram matrix of centred unit vectors.

    s: (B, T, C) states
    """
    s = s.float()
    s = s - s.mean(-1, keepdim=True)
    s = s / s.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    T = s.shape[1]
    total = s.sum(1).square().sum(-1)  # sum of all entries; those of the diagonal are 1
    return float(((total - T) / max(1, T * (T - 1))).mean())


def anchored(found: dict, mean: int, loss: float) -> dict:
    """Return the result of `measure`, its losses shifted so that the one at the mean is `loss`.

    The differences between recurrences vary far less from window to window than the losses do. So
    the shifted losses are better estimates, and the row of metrics.jsonl does not contradict
    itself.

    found: result of `measure`
    mean: mean recurrence
    loss: loss at the mean recurrence, on more windows than `measure` had
    """
    if not found:
        return found
    losses = found["val_loss_at_r"]
    moved = {r: loss + (x - losses[str(mean)]) for r, x in losses.items()}
    return {**found, "val_loss_at_r": {**moved, str(mean): loss}}


def line(row: dict, mean: int) -> str:
    """Return the losses by recurrence as one line.

    row: row of metrics.jsonl with the result of `measure`
    mean: mean recurrence
    """
    losses = row["val_loss_at_r"].items()
    parts = (f"{r}: {x:.3f}" + " (mean)" * (r == str(mean)) for r, x in losses)
    return "loss at r " + "  ".join(parts)


def alarms(row: dict, mean: int) -> dict[str, str]:
    """Return the failures in a row that `measure` made: kind -> text of the warning.

    row: row of metrics.jsonl with the result of `measure`
    mean: mean recurrence
    """
    found, losses = {}, row["val_loss_at_r"]
    if row["token_correlation"] > COLLAPSED:
        found["collapsed"] = (
            "the states of all tokens are similar (correlation "
            f"{row['token_correlation']:.2f}): the recurrence has collapsed; "
            "start again with a smaller --learning-rate"
        )
    if bad := [r for r, loss in losses.items() if not math.isfinite(loss)]:
        found["not finite"] = (
            f"the loss is not finite at {', '.join(bad)} iterations of the core; do not "
            "sample with that many"
        )
    gain = losses["1"] - losses[str(mean)]
    if mean > 1 and gain < LEAST_GAIN:
        found["ignored"] = (
            f"{mean} iterations of the core are worth {gain:.3f} nats more than one: the "
            "recurrence is hardly used"
        )
    if row["state_growth"] > GROWING:
        found["growing"] = (
            f"the state grows {row['state_growth']:.1f} times from {mean} to {4 * mean} "
            "iterations; more of them will do harm"
        )
    return found
