"""From prompts to new tokens: a generator over a key-value cache.

A row's tokens depend on its prompt, the seed and its sample number, not on its neighbours, and
not on whether a cache is used. Past seq_len the context is cut to its last half (see `Context`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.errors import DivergedError, UsageError
from minillm.inference.early_exit import ExitRule, read_next
from minillm.inference.sampling_params import check_prompts, check_recurrence, check_sampling
from minillm.model.gpt import GPT
from minillm.model.kv_cache import KVCache
from minillm.model.recurrence import state_keys


@dataclass(frozen=True)
class Token:
    """One new token of one row.

    row: which prompt.    id: the token.    logprob: of it, under the model's own distribution
    (no temperature, no filter), natural logarithm.    recurrence: how often the core ran for it.
    """

    row: int
    id: int
    logprob: float
    recurrence: int | None = None


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    first: Sequence[int] = (),
    stop: Callable[[int, list[int]], bool] | None = None,
    use_cache: bool = True,
    recurrence: int | None = None,
    recurrent_cache: str = "full",
    exit_rule: ExitRule | None = None,
    warm_start: bool = False,
) -> Iterator[Token]:
    """Continue each prompt, all rows in step; yields the rows' tokens as they are made.

    prompts: token ids, each at least one.
    first: the tokens from which each row's first new one is taken; empty: all.
    stop: stop(row, its tokens so far) tells after each token whether the row has ended. A row of a
    model with a document mask also ends with BOS.
    repetition_penalty: Keskar et al. 2019, arXiv:1909.05858, section 4.1; over prompt and text.
    seed, samples: the random number of a token is a function of (seed, samples[row], how many
    tokens the row has made), so row 3 of a batch is what `samples=[3]` gives alone.
    recurrence: iterations of a recurrent model's core; default: its mean.    recurrent_cache:
    "full" keeps keys and values of each, so that tokens are those without a cache; "slot" those of
    the last alone, so that memory does not grow with them.    exit_rule: when a token may leave the
    core earlier, see exits.py; prompts are read at the full recurrence.    warm_start: the core
    starts each new token from the state the one before it ended in, which saves iterations of some
    models and costs others more (benchmarks/recurrence); tokens are then not those of reading the
    text at once.
    Raises UsageError on an option outside its range or without effect beside the others, an empty
    prompt or a token beyond the vocabulary; DivergedError where the logits are no distribution, see
    `require_choice`.
    """
    check_sampling(max_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
    check_prompts(model, prompts, samples)
    numbers = list(range(len(prompts))) if samples is None else list(samples)
    texts = [list(prompt) for prompt in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    # MPS has no float64, which sampling wants.
    device = model.head.weight.device
    device = torch.device("cpu") if device.type == "mps" else device
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    often = check_recurrence(model, recurrence, recurrent_cache)
    if (exit_rule is not None or warm_start) and (often[0] is None or not use_cache):
        raise UsageError("an exit rule and a warm start are of recurrent models, with a cache")
    if recurrent_cache != "full" and not use_cache:
        raise UsageError(f"recurrent_cache {recurrent_cache!r} has no effect without use_cache")
    depth = Depth(seed, tuple(numbers), *often, exit_rule, warm_start)
    context = Context(model, texts, use_cache, depth)
    for made in range(max_tokens):
        logits = context.next_logits().to(device, torch.float32)  # (rows, V)
        logprobs = logits.log_softmax(-1)
        if repetition_penalty != 1.0:
            logits = penalise(logits, [texts[r] for r in context.rows], repetition_penalty)
        if first and made == 0:
            logits = only(logits, first)
        rows = torch.tensor([numbers[r] for r in context.rows], device=device)
        u = model.ops.uniform(seed, rows, torch.full_like(rows, made))
        ids = model.ops.sample(logits, u, **options)
        chosen = logprobs.gather(-1, ids[:, None])[:, 0].tolist()
        for i, row in enumerate(context.rows):
            require_choice(model, chosen[i], logits[i], row, len(new[row]), len(texts[row]))
        ended = set()
        drawn = zip(list(context.rows), ids.tolist(), chosen, context.steps(), strict=True)
        for row, token, logprob, steps in drawn:
            texts[row].append(token)
            new[row].append(token)
            yield Token(row, token, logprob, steps)
            # With a document mask what follows BOS would not see what stands before it.
            over = model.config.document_mask and token == model.config.bos_id
            if over or (stop is not None and stop(row, new[row])):
                ended.add(row)
        if ended:
            context.drop(ended)
        if not context.rows:
            return


@dataclass(frozen=True)
class Depth:
    """How a recurrent model is read: start states by seed and sample, iterations, cached or not."""

    seed: int
    samples: tuple[int, ...]
    recurrence: int | None
    cached: int | None
    rule: ExitRule | None
    warm: bool


class Context:
    """What the model has read of each row, and the next token's logits.

    A row that reaches seq_len tokens is cut to its last seq_len // 2 (at least 1), which are read
    anew from position 0; it then grows again. Without a cache the same tokens are read each time.
    """

    def __init__(self, model: GPT, texts: list[list[int]], use_cache: bool, depth: Depth) -> None:
        self.model, self.texts, self.use_cache, self.depth = model, texts, use_cache, depth
        self.rows = list(range(len(texts)))
        self.starts = dict.fromkeys(self.rows, 0)
        longest = model.config.seq_len
        for row, text in enumerate(texts):
            if len(text) > longest:
                self.starts[row] = len(text) - max(1, longest // 2)
        self.cache: KVCache | None = None
        self._steps: list[int] | None = None
        self.device = model.head.weight.device

    def next_logits(self) -> Tensor:
        """(rows, V) for the token after each row's text."""
        cut, self._steps = self._cut(), None
        count = range(len(self.rows))
        if not self.use_cache:
            return torch.cat([self._logits(self._unread(r, 0), None, [r]) for r in self.rows])
        if self.cache is None:
            depth = self.depth
            self.cache = self.model.make_cache(len(count), None, depth.cached, depth.warm)
            return torch.cat([self._read(i, held=0) for i in count])
        if cut:
            # Once in seq_len / 2 tokens; the others then go one by one, too.
            self._steps = [self.depth.recurrence] * len(self.rows)
            return torch.cat([self._alone(i, self.rows[i] in cut) for i in count])
        last = torch.tensor([[self.texts[row][-1]] for row in self.rows], device=self.device)
        depth = self.depth
        if depth.rule is None:
            return self._logits(last, self.cache, self.rows)
        keys = self.keys(self.rows)
        found = read_next(self.model, last, self.cache, depth.rule, depth.recurrence, keys)
        logits, self._steps = found
        return logits

    def steps(self) -> list[int | None]:
        """How often the core ran for each row's last logits."""
        return self._steps or [self.depth.recurrence] * len(self.rows)

    def drop(self, ended: set[int]) -> None:
        """Forget rows that have ended."""
        kept = [i for i, row in enumerate(self.rows) if row not in ended]
        self.rows = [self.rows[i] for i in kept]
        if self.cache is not None and kept:
            self.cache.keep_rows(kept)

    def _cut(self) -> set[int]:
        """Move the start of rows that have outgrown seq_len; returns those rows."""
        longest = self.model.config.seq_len
        cut = {r for r in self.rows if len(self.texts[r]) - self.starts[r] > longest}
        for row in cut:
            self.starts[row] = len(self.texts[row]) - max(1, longest // 2)
        return cut

    def _unread(self, row: int, held: int) -> Tensor:
        return torch.tensor([self.texts[row][self.starts[row] + held :]], device=self.device)

    def _alone(self, i: int, cut: bool) -> Tensor:
        """The i-th row's next logits, (1, V), read anew if it was cut."""
        held = 0 if cut else self.cache.lengths[i]
        rule = self.depth.rule
        if cut or rule is None:
            return self._read(i, held)
        row, cache = self.rows[i], self.cache.row_view(i, held)
        last, keys = self._unread(row, held), self.keys([row])
        logits, steps = read_next(self.model, last, cache, rule, self.depth.recurrence, keys)
        self.cache.update_row(i, cache)
        self._steps[i] = steps[0]
        return logits

    def _read(self, i: int, held: int) -> Tensor:
        """Read what the i-th row's cache, keeping its first `held` entries, lacks; (1, V)."""
        cache = self.cache.row_view(i, held)
        row = self.rows[i]
        logits = self._logits(self._unread(row, held), cache, [row])
        self.cache.update_row(i, cache)
        return logits

    def _logits(self, tokens: Tensor, cache: KVCache | None, rows: list[int]) -> Tensor:
        x = self.model.trunk(tokens, cache, self.depth.recurrence, self.keys(rows))
        return self.model.logits(x[:, -1])

    def keys(self, rows: list[int]) -> Tensor:
        """(rows,) keys of the start states of these rows."""
        samples = torch.tensor([self.depth.samples[r] for r in rows], device=self.device)
        return state_keys(self.depth.seed, samples)


def require_choice(
    model: GPT, logprob: float, logits: Tensor, row: int, made: int, position: int
) -> None:
    """Raise DivergedError unless a token was drawn from a distribution.

    logprob: of the token that was drawn. It is NaN if any logit of the row is NaN or plus infinity,
    or all are minus infinity, so that no other test of the logits is needed.
    logits: (V,), which the message describes.    row: of the batch.    made: new tokens of the row
    so far.    position: tokens of its text so far, the prompt's among them.
    """
    if math.isfinite(logprob):
        return
    count, V = int(logits.isnan().sum()), logits.shape[-1]
    what = f"{count} of the {V} logits are NaN" if count else "the logits are infinite"
    advice = ["use --dtype fp32"] if model.dtype not in (torch.float32, torch.float64) else []
    advice += ["use another --recurrence"] if model.config.recurrent is not None else []
    advice += ["take another --checkpoint"]
    raise DivergedError(
        f"new token {made + 1} of sample {row} (position {position}): {what}, so the model's "
        f"numbers have overflowed; {' or '.join(advice)}"
    )


def only(logits: Tensor, allowed: Sequence[int]) -> Tensor:
    """Logits, (rows, V), of which all but the allowed tokens' are minus infinity."""
    barred = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    barred[torch.tensor(allowed, device=logits.device)] = False
    return logits.masked_fill(barred, -torch.inf)


def penalise(logits: Tensor, texts: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Divide positive logits of tokens already in a row's text by `penalty`, multiply others.

    logits: (rows, V).    Returns a new tensor of that shape.
    """
    logits = logits.clone()
    for row, text in zip(logits, texts, strict=True):
        seen = torch.tensor(sorted(set(text)), device=logits.device)
        z = row[seen]
        row[seen] = torch.where(z > 0, z / penalty, z * penalty)
    return logits
