"""Draw the next token of each row from the model's logits."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minillm.config.sampling import SamplingParams
from minillm.errors import DivergedError, parameter
from minillm.inference.decoding_batch import DecodingBatch
from minillm.model.gpt import GPT

# mask(row, new tokens of the row so far) returns which tokens may come next, (V,) bool, or None
# where all may.
Mask = Callable[[int, list[int]], Tensor | None]


def draw(
    batch: DecodingBatch,
    logits: Tensor,
    params: SamplingParams,
    mask: Mask | None = None,
    drafted: Tensor | None = None,
) -> Tensor:
    """Return the next token of each row of the batch, (rows,) int64.

    batch: the rows that have not ended
    logits: (rows, V)
    params: temperature, filters, repetition penalty and seed
    mask: which tokens are allowed
    drafted: (rows, n) tokens after those of the batch that the drawn ones follow

    The random number of a token is a function of the seed, the row's sample number and the number
    of new tokens before it.
    """
    device, n = logits.device, 0 if drafted is None else drafted.shape[1]
    # MPS has no float64, which sampling needs.
    here = torch.device("cpu") if device.type == "mps" else device
    logits = logits.to(here, torch.float32)
    if params.repetition_penalty != 1.0:
        texts = [batch.texts[row] for row in batch.rows]
        logits = penalise(logits, texts, params.repetition_penalty)
    if mask is not None:
        ahead = [[]] * len(batch.rows) if drafted is None else drafted.tolist()
        texts = [batch.new[row] + more for row, more in zip(batch.rows, ahead, strict=True)]
        logits = masked(logits, [mask(r, new) for r, new in zip(batch.rows, texts, strict=True)])
    samples = torch.tensor([batch.samples[row] for row in batch.rows], device=here)
    made = torch.tensor([len(batch.new[row]) + n for row in batch.rows], device=here)
    ids = batch.model.ops.sample(
        logits,
        batch.model.ops.uniform(params.seed, samples, made),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
    )
    return ids.to(device)


def masked(logits: Tensor, allowed: Sequence[Tensor | None]) -> Tensor:
    """Return logits, (rows, V), that are minus infinity where a row's token is not allowed.

    logits: (rows, V)
    allowed: (V,) bool of each row, or None where all tokens are
    """
    if all(each is None for each in allowed):
        return logits
    all_of_them = torch.ones(logits.shape[-1], dtype=torch.bool)
    rows = [(all_of_them if each is None else each).to(logits.device) for each in allowed]
    return logits.masked_fill(~torch.stack(rows), -torch.inf)


def penalise(logits: Tensor, texts: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Divide positive logits of tokens that a row's text has by `penalty`, multiply negative ones.

    logits: (rows, V)
    texts: tokens of each row
    penalty: factor, 1 for no change

    Returns a new tensor, (rows, V). Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1.
    """
    logits = logits.clone()
    for row, text in zip(logits, texts, strict=True):
        seen = torch.tensor(sorted(set(text)), device=logits.device)
        z = row[seen]
        row[seen] = torch.where(z > 0, z / penalty, z * penalty)
    return logits


def require_finite(
    model: GPT, logprob: float, logits: Tensor, row: int, made: int, position: int
) -> None:
    """Raise DivergedError if the logits that a token was drawn from are no distribution.

    model: the decoder, for advice
    logprob: log-probability of the drawn token. It is NaN if any logit of the row is NaN or plus
        infinity, or if all are minus infinity, so that no other test of the logits is needed.
    logits: (V,), which the message describes
    row: number of the prompt
    made: new tokens of the row before this one
    position: tokens of its text before this one, the prompt's among them
    """
    if math.isfinite(logprob):
        return
    count, V = int(logits.isnan().sum()), logits.shape[-1]
    what = f"{count} of the {V} logits are NaN" if count else "the logits are infinite"
    advice = []
    if model.dtype not in (torch.float32, torch.float64):
        advice += [f"use {parameter('dtype')} fp32"]
    if model.config.recurrent is not None:
        advice += [f"use another {parameter('recurrence')}"]
    advice += [f"take another {parameter('checkpoint')}"]
    raise DivergedError(
        f"new token {made + 1} of sample {row} (position {position}): {what}, so the model's "
        f"numbers have overflowed; {' or '.join(advice)}"
    )
