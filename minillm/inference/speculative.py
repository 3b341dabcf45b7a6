"""Self-speculative decoding: draft tokens with few iterations, verify many of them in one pass.

The draft's iterations are the first ones of the verification. Their states and, in the full cache,
their keys and values are reused, so that nothing but the coda is computed twice.

The tokens are those of plain decoding at the verifying recurrence: in fp32 exactly, in bf16 up to
rounding. A pass over several tokens rounds differently from a pass over one, which can flip
near-ties. This holds for sampled tokens too, since the random number of a token is a function of
the seed, the sample number and the number of tokens before it.
Source: Geiping et al. 2025, arXiv:2502.05171, section 6.4.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.config.sampling import SamplingParams
from minillm.errors import UsageError, parameter
from minillm.inference.checks import check_prompts, core_options
from minillm.inference.decoding_batch import DecodingBatch, Stop, Token
from minillm.inference.draw import Mask, draw, require_finite
from minillm.model.gpt import GPT
from minillm.model.inputs import CoreState

LOOKAHEAD = 4  # tokens drafted at a time


@dataclass
class Tally:
    """Counts of speculative decoding: tokens that were drafted, and those that were accepted."""

    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Verified:
    """The tokens of one pass at the full recurrence.

    logits: (rows, n, V)
    ids: (rows, n) int64, drawn from the logits
    counts: number of these tokens that each row takes
    agreed: number of drafted tokens that were right in each row
    """

    logits: Tensor
    ids: Tensor
    counts: list[int]
    agreed: list[int]


@torch.inference_mode()
def speculate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    lookahead: int = LOOKAHEAD,
    samples: Sequence[int] | None = None,
    mask: Mask | None = None,
    stop: Stop | None = None,
    tally: Tally | None = None,
) -> Iterator[Token]:
    """Yield the tokens of plain decoding, which are drafted first; rows may be some tokens apart.

    params: sampling parameters; draft_recurrence must be given
    lookahead: number of tokens that are drafted before they are verified
    tally: counts the drafted and the accepted tokens
    model, prompts, samples, mask, stop: see minillm.inference.generate.generate

    Raises UsageError, or DivergedError, as that function does.
    """
    check_prompts(model, prompts, samples)
    core = core_options(model, params)
    if params.draft_recurrence is None:
        raise UsageError(f"{parameter('draft_recurrence')}: speculative decoding needs it")
    if lookahead < 1:
        raise UsageError(f"lookahead {lookahead}: expected 1 or more")
    batch = DecodingBatch(model, prompts, samples, params.seed, core)
    tally = Tally() if tally is None else tally
    while batch.rows:
        n = _tokens_to_draft(batch, params, lookahead)
        if n < 2:
            verified = _one_token(batch, params, mask)
        else:
            verified = _cycle(batch, params, mask, n)
            tally.drafted += n * len(batch.rows)
            tally.accepted += sum(verified.agreed)
        yield from _accepted(batch, verified, params, stop)
        batch.drop_ended()


def _tokens_to_draft(batch: DecodingBatch, params: SamplingParams, lookahead: int) -> int:
    """Return how many tokens to draft; below 2 the next token is made without a draft."""
    if batch.cache is None:  # the prompts are yet to be read
        return 0
    left = params.max_tokens - min(len(batch.new[row]) for row in batch.rows)
    room = batch.model.config.seq_len - max(batch.cache.lengths)
    return min(lookahead, left, room)


def _one_token(batch: DecodingBatch, params: SamplingParams, mask: Mask | None) -> Verified:
    """Make the next token of each row by plain decoding."""
    logits = batch.next_logits()
    ids = draw(batch, logits, params, mask)
    return Verified(logits[:, None], ids[:, None], [1] * len(batch.rows), [0] * len(batch.rows))


def _accepted(
    batch: DecodingBatch, verified: Verified, params: SamplingParams, stop: Stop | None
) -> Iterator[Token]:
    """Add the verified tokens to their rows, up to the one with which a row ends; yield them."""
    logprobs = verified.logits.float().log_softmax(-1)
    logprobs = logprobs.gather(-1, verified.ids[..., None])[..., 0].tolist()
    ids, model = verified.ids.tolist(), batch.model
    for i, row in enumerate(batch.rows):
        for n in range(verified.counts[i]):
            made, position = len(batch.new[row]), len(batch.texts[row])
            logprob, logits = logprobs[i][n], verified.logits[i, n]
            require_finite(model, logprob, logits, row, made, position)
            ended = batch.append(row, ids[i][n], params.max_tokens, stop)
            yield Token(row, ids[i][n], logprob, batch.core.recurrence)
            if ended:
                break


def _cycle(
    batch: DecodingBatch, params: SamplingParams, mask: Mask | None, lookahead: int
) -> Verified:
    """Draft `lookahead` tokens after each row's last one, and verify them in one pass.

    A row takes as many tokens as its draft had right, and one more. The cache then holds all that
    stands before the last of them.
    """
    model, cache, few, many = (
        batch.model,
        batch.cache,
        params.draft_recurrence,
        batch.core.recurrence,
    )
    last = torch.tensor([[batch.texts[row][-1]] for row in batch.rows], device=batch.device)
    keys = batch.keys(batch.rows)
    held, tokens, drafts = list(cache.lengths), [last], []
    for _ in range(lookahead):
        draft = model.iterate(model.begin(tokens[-1], cache, keys), few)
        logits = model.logits(model.finish(draft)[:, -1])
        drafted = torch.cat(tokens, 1)[:, 1:]
        tokens.append(draw(batch, logits, params, mask, drafted)[:, None])
        drafts.append(draft)
        cache.advance(1)
    cache.lengths = held
    inputs, _ = model.embed_tokens(torch.cat(tokens[:-1], 1), cache)
    states, texts = [draft.state for draft in drafts], [draft.text for draft in drafts]
    drafted_core = CoreState(inputs, torch.cat(texts, 1), torch.cat(states, 1), few)
    logits = model.logits(model.finish(model.iterate(drafted_core, many)))
    drafted = torch.cat(tokens, 1)[:, 1:]
    right = [draw(batch, logits[:, i], params, mask, drafted[:, :i]) for i in range(lookahead)]
    right = torch.stack(right, 1)
    agreed = (right == drafted).long().cumprod(1).sum(1).tolist()
    stand = [min(n + 1, lookahead) for n in agreed]
    cache.lengths = [length + n for length, n in zip(held, stand, strict=True)]
    return Verified(logits, right, stand, agreed)
