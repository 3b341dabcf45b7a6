"""Score texts: the log-probability of every token, given the text before it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from minillm.config.sampling import SamplingParams
from minillm.data.tokenizer import Tokenizer
from minillm.errors import DivergedError, UsageError
from minillm.inference.checks import core_options, require_eval_mode
from minillm.inference.decoding_batch import kept_at_the_end
from minillm.model.gpt import GPT
from minillm.model.recurrence import state_keys

ROWS = 8  # windows that are read together


@dataclass(frozen=True)
class Score:
    """The probability of a text under a model.

    nats: minus the natural log-probability of the whole text
    bits_per_byte: the same in bits, divided by the number of UTF-8 bytes of the text
    tokens: ids of the text
    logprobs: natural log-probability of each token
    """

    nats: float
    bits_per_byte: float
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Window:
    """A part of a text that is read at once.

    text: number of the text
    ids: at most seq_len tokens
    targets: tokens that follow the last ones of `ids`, as many as are predicted from this window
    """

    text: int
    ids: list[int]
    targets: list[int]


@torch.inference_mode()
def score(
    model: GPT, tokenizer: Tokenizer, texts: Sequence[str], recurrence: int | None = None
) -> list[Score]:
    """Return the score of each text, each from its first token to its last.

    The first token is predicted from the tokens that generate() reads for an empty prompt. Beyond
    seq_len the context is cut to its last half, as in generate(). Therefore every token has at
    least half of seq_len before it, and the log-probabilities are those that generate() reports.

    model: the decoder
    tokenizer: the tokenizer that it was trained with
    texts: texts of any length
    recurrence: iterations of the core; default: the model's mean

    Raises UsageError if a text is empty, if the tokenizer cannot encode it, or if the model is in
    training mode and has dropout. Raises DivergedError if the logits are not finite.
    """
    require_eval_mode(model)
    core = core_options(model, SamplingParams(recurrence=recurrence))
    before = tokenizer.prompt_ids("", model.config.document_mask)
    ids = [tokenizer.encode(text) for text in texts]
    for number, tokens in enumerate(ids):
        if not tokens:
            raise UsageError(f"text {number} is empty; there is nothing to score")
    windows = [
        window for number, tokens in enumerate(ids)
        for window in windows_of(number, before, tokens, model.config.seq_len,
                                 kept_at_the_end(model))
    ]  # fmt: skip
    logprobs: list[list[float]] = [[] for _ in texts]
    for window, found in zip(windows, _read_all(model, windows, core.recurrence), strict=True):
        logprobs[window.text] += found
    return [_score(*each) for each in zip(texts, ids, logprobs, strict=True)]


def windows_of(
    number: int, before: list[int], tokens: list[int], longest: int, kept: int
) -> Iterator[Window]:
    """Yield the windows of a text, so that each of its tokens is the target of one.

    number: number of the text
    before: tokens that the first one of the text is predicted from
    tokens: ids of the text
    longest: tokens of a window, at most
    kept: tokens that the next window begins with, once the text has outgrown a window
    """
    whole = before + tokens
    start, target = 0, len(before)
    while target < len(whole):
        if target - start > longest:
            start = target - kept
        end = min(start + longest, len(whole) - 1)
        yield Window(number, whole[start:end], whole[target : end + 1])
        target = end + 1


def _read_all(model: GPT, windows: list[Window], recurrence: int | None) -> list[list[float]]:
    """Return the log-probabilities of each window's targets, in the order of the windows.

    Windows of similar length are read together, so that little is padded.
    """
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids))
    found: list[list[float]] = [[] for _ in windows]
    for start in range(0, len(windows), ROWS):
        numbers = order[start : start + ROWS]
        rows = _read(model, [windows[i] for i in numbers], recurrence)
        for i, logprobs in zip(numbers, rows, strict=True):
            found[i] = logprobs
    return found


def _read(model: GPT, windows: list[Window], recurrence: int | None) -> list[list[float]]:
    """Return the log-probabilities of each window's targets; all windows are read at once."""
    device, longest = model.head.weight.device, max(len(window.ids) for window in windows)
    # Attention is causal: what is padded on the right changes nothing before it.
    tokens = torch.tensor([w.ids + [0] * (longest - len(w.ids)) for w in windows], device=device)
    keys = state_keys(0, torch.zeros(len(windows), dtype=torch.int64, device=device))
    x = model.trunk(tokens, None, recurrence, keys)
    found = []
    for row, window in enumerate(windows):
        here = slice(len(window.ids) - len(window.targets), len(window.ids))
        logprobs = model.logits(x[row, here]).float().log_softmax(-1)
        targets = torch.tensor(window.targets, device=device)
        found.append(logprobs.gather(-1, targets[:, None])[:, 0].tolist())
    return found


def _score(text: str, tokens: list[int], logprobs: list[float]) -> Score:
    nats = -math.fsum(logprobs)
    if not math.isfinite(nats):
        bad = next(i for i, logprob in enumerate(logprobs) if not math.isfinite(logprob))
        raise DivergedError(f"token {bad} of the text has log-probability {logprobs[bad]}")
    return Score(nats, nats / math.log(2) / len(text.encode()), tokens, logprobs)
