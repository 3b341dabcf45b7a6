"""What recurrent depth does to the loss: evaluated at several recurrences, with three alarms.

Each alarm is a way in which recurrence fails unseen in the loss alone: tokens that become one
another (collapse), iterations that change nothing (ignored), a state that grows without end.
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

COLLAPSED = 0.9  # correlation of tokens
IGNORED = 0.02  # nats that the mean recurrence gains over one
GROWING = 1.5  # times, from the mean recurrence to four times it


def rungs(mean: int) -> list[int]:
    """1, 2, 4, ... up to the mean, and the mean, twice and four times it."""
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
    """What a row of metrics.jsonl says of the recurrence, on windows that the ranks share.

    val_loss_at_r: {"1": nats a token, ...}.    token_correlation: of the state at the mean, 0 to 1,
    see `correlation`.    state_growth: its norm at four times the mean by that at the mean.
    poll: called before each batch, on all ranks.
    """
    mean, device = model.config.mean_recurrence, model.head.weight.device
    at, training = rungs(mean), model.training
    ranks = Ranks() if ranks is None else ranks
    model.eval()
    losses, norms = torch.zeros(2, len(at), dtype=torch.float64, device=ranks.sums_on)
    count, alike, batches = torch.zeros(3, dtype=torch.float64, device=ranks.sums_on)
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
                alike += correlation(s)
        count, batches = count + n, batches + bool(n)
    model.train(training)
    for x in (losses, norms, count, alike, batches):
        ranks.sum(x)
    if not count:
        return {}
    growth = norms[at.index(4 * mean)] / norms[at.index(mean)].clamp(min=1e-30)
    return {
        "val_loss_at_r": {str(r): float(x) for r, x in zip(at, losses / count, strict=True)},
        "token_correlation": float(alike / batches),
        "state_growth": float(growth),
    }


def correlation(s: Tensor) -> float:
    """How much the tokens of a sequence point one way: the mean of the Gram matrix's entries off
    the diagonal, of centred unit vectors.    s: (B, T, C).
    """
    s = s.float()
    s = s - s.mean(-1, keepdim=True)
    s = s / s.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    T = s.shape[1]
    total = s.sum(1).square().sum(-1)  # of all entries; those of the diagonal are 1
    return float(((total - T) / max(1, T * (T - 1))).mean())


def anchored(found: dict, mean: int, loss: float) -> dict:
    """Return what `measure` found, with its losses moved so that the one at the mean is `loss`.

    loss: at the mean recurrence, on more windows than `measure` had. The differences between the
    recurrences vary far less from window to window than the losses do: this is the better estimate
    of each, and one row of metrics.jsonl does not contradict itself.
    """
    if not found:
        return found
    losses = found["val_loss_at_r"]
    moved = {r: loss + (x - losses[str(mean)]) for r, x in losses.items()}
    return {**found, "val_loss_at_r": {**moved, str(mean): loss}}


def line(row: dict, mean: int) -> str:
    """Return the losses by recurrence as one line."""
    losses = row["val_loss_at_r"].items()
    told = (f"{r}: {x:.3f}" + " (mean)" * (r == str(mean)) for r, x in losses)
    return "loss at r " + "  ".join(told)


def alarms(row: dict, mean: int) -> dict[str, str]:
    """Return what `measure` found wrong: kind -> a line to warn with."""
    found, losses = {}, row["val_loss_at_r"]
    if row["token_correlation"] > COLLAPSED:
        found["collapsed"] = (
            f"the states of all tokens are alike (correlation {row['token_correlation']:.2f}): the "
            "recurrence has collapsed; start again with a smaller --learning-rate"
        )
    if bad := [r for r, loss in losses.items() if not math.isfinite(loss)]:
        found["not finite"] = (
            f"the loss is not finite at {', '.join(bad)} iterations of the core; so many must not "
            "be asked for"
        )
    gain = losses["1"] - losses[str(mean)]
    if mean > 1 and gain < IGNORED:
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
