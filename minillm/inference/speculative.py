"""Self-speculative decoding: tokens drafted with few iterations, verified with many in one pass.

The draft's iterations are the first of the verification's: their states and, in the full cache,
their keys and values are taken over, and nothing is computed twice but the coda. The tokens are
those of plain decoding at the verifying recurrence, in fp32 to the token, in bf16 up to rounding:
several tokens at once round otherwise than one, which may tip a choice between equals. Sampled ones
too, as the random number of a token is a function of seed, sample and how many came before it.
Source: Geiping et al. 2025, arXiv:2502.05171, section 6.4.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.errors import UsageError
from minillm.inference.generate import Context, Depth, Token, only, require_choice
from minillm.inference.sampling_params import check_prompts, check_recurrence, check_sampling
from minillm.model.gpt import GPT
from minillm.model.inputs import CoreState
from minillm.model.kv_cache import KVCache

LOOKAHEAD = 4  # tokens drafted at a time


@dataclass
class Tally:
    """What speculation came to: tokens drafted, and those that the verification kept."""

    drafted: int = 0
    accepted: int = 0


@torch.inference_mode()
def speculate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    draft_recurrence: int,
    lookahead: int = LOOKAHEAD,
    max_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    first: Sequence[int] = (),
    stop: Callable[[int, list[int]], bool] | None = None,
    recurrence: int | None = None,
    tally: Tally | None = None,
) -> Iterator[Token]:
    """As generate at `recurrence`, the same tokens (in bf16 up to rounding); rows may be several
    tokens apart.

    draft_recurrence: iterations of a draft, fewer than `recurrence`.    lookahead: tokens drafted
    before they are verified.    tally: is counted in.
    Raises as generate does, and UsageError on a draft that is no shorter.
    """
    check_sampling(max_tokens, temperature, top_k, top_p, min_p, 1.0)
    check_prompts(model, prompts, samples)
    r, _ = check_recurrence(model, recurrence, "full")
    if r is None:
        raise UsageError("--draft-recurrence: this model has no core to run again; leave it out")
    if r == 1:
        raise UsageError("--draft-recurrence: nothing is shorter than --recurrence 1; leave it out")
    if not 1 <= draft_recurrence < r:
        raise UsageError(
            f"--draft-recurrence {draft_recurrence}: expected 1 to {r - 1}, fewer than "
            f"--recurrence {r}"
        )
    if lookahead < 1:
        raise UsageError(f"lookahead is {lookahead}; expected 1 or more")
    numbers = list(range(len(prompts))) if samples is None else list(samples)
    texts, new = [list(prompt) for prompt in prompts], [[] for _ in prompts]
    device = model.head.weight.device
    tally = Tally() if tally is None else tally

    def choose(logits: Tensor, ahead: int) -> Tensor:
        """(rows,) tokens from logits, (rows, V), of the token so far ahead of each row's next."""
        rows = torch.tensor([numbers[row] for row in context.rows], device=device)
        made = torch.tensor([len(new[row]) + ahead for row in context.rows], device=device)
        u = model.ops.uniform(seed, rows, made)
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        return model.ops.sample(logits.float(), u, **options)

    context = Context(model, texts, True, Depth(seed, tuple(numbers), r, r, None, False))
    while context.rows:
        wanted = min(lookahead, max_tokens - min(len(new[row]) for row in context.rows))
        if context.cache is not None:
            wanted = min(wanted, model.config.seq_len - max(context.cache.lengths))
        if context.cache is None or wanted < 2:
            logits = context.next_logits()
            barred = only(logits, first) if first and not any(new) else logits
            found = [logits[:, None], choose(barred, 0)[:, None], [1] * len(context.rows)]
        else:
            last = torch.tensor([[texts[row][-1]] for row in context.rows], device=device)
            keys = context.keys(context.rows)
            found = _cycle(model, context.cache, last, keys, (draft_recurrence, r), wanted, choose)
            tally.drafted += wanted * len(context.rows)
            tally.accepted += sum(found[3])
        ended = set()
        logprobs = found[0].float().log_softmax(-1).gather(-1, found[1][..., None])[..., 0]
        every = zip(list(context.rows), found[1].tolist(), logprobs.tolist(), found[2], strict=True)
        for i, (row, ids, told, count) in enumerate(every):
            for ahead in range(count):
                made, position = len(new[row]) + ahead, len(texts[row]) + ahead
                require_choice(model, told[ahead], found[0][i, ahead], row, made, position)
            for token, logprob in list(zip(ids, told, strict=True))[:count]:
                texts[row].append(token)
                new[row].append(token)
                yield Token(row, token, logprob, r)
                over = model.config.document_mask and token == model.config.bos_id
                stopped = stop is not None and stop(row, new[row])
                if over or stopped or len(new[row]) == max_tokens:
                    ended.add(row)
                    break
        if ended:
            context.drop(ended)


def _cycle(
    model: GPT,
    cache: KVCache,
    last: Tensor,
    keys: Tensor,
    recurrences: tuple[int, int],
    lookahead: int,
    choose: Callable[[Tensor, int], Tensor],
) -> list:
    """Draft so many tokens after each row's `last`, (B, 1), and verify them.

    recurrences: of draft and verification.    choose: see speculate.
    Returns the verified logits, (B, lookahead, V); the tokens drawn from them; how many of these
    stand, by row: as many as the draft had right, and one more; how many it had right. The cache
    then holds what is before the last of them.
    """
    few, many = recurrences
    held, tokens, drafts = list(cache.lengths), [last], []
    for ahead in range(lookahead):
        draft = model.iterate(model.begin(tokens[-1], cache, keys), few)
        logits = model.logits(model.finish(draft)[:, -1])
        tokens.append(choose(logits, ahead)[:, None])
        drafts.append(draft)
        cache.advance(1)
    cache.lengths = held
    inputs, _ = model.embed_tokens(torch.cat(tokens[:-1], 1), cache)
    states, texts = [d.state for d in drafts], [d.text for d in drafts]
    drafted = CoreState(inputs, torch.cat(texts, 1), torch.cat(states, 1), few)
    logits = model.logits(model.finish(model.iterate(drafted, many)))
    right = torch.stack([choose(logits[:, i], i) for i in range(lookahead)], 1)
    agreed = (right == torch.cat(tokens[1:], 1)).long().cumprod(1).sum(1).tolist()
    stand = [min(n + 1, lookahead) for n in agreed]
    cache.lengths = [length + n for length, n in zip(held, stand, strict=True)]
    return [logits, right, stand, agreed]
