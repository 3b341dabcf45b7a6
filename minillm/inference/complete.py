"""Continue prompts of text, with stop texts and token healing.

`stream_text` yields pieces of text as they become certain; `complete` returns them when all is
done. sample.py, the samples of a training and minillm.load(...).generate use them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from minillm.config.sampling import SamplingParams
from minillm.data.tokenizer import Tokenizer
from minillm.errors import UnavailableError, parameter
from minillm.inference.checks import CoreOptions, core_options
from minillm.inference.decoding_batch import kept_at_the_end
from minillm.inference.draw import Mask
from minillm.inference.generate import generate
from minillm.inference.text_stream import TextStream
from minillm.model.gpt import GPT
from minillm.model.kv_cache import slots
from minillm.runtime import device


@dataclass
class Completion:
    """The continuation of one prompt; it grows while the text is generated.

    prompt: the text that is continued
    text: the continuation, without the stop text that ended it
    tokens: its ids, without the BOS that ended it
    logprobs: natural log-probability of each token under the model itself
    recurrences: iterations of the core for each token; None without a core
    finish: "stop" for a stop text, "document" for BOS, "length" for max_tokens
    """

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    recurrences: list[int | None] = field(default_factory=list)
    finish: str = "length"


@dataclass(frozen=True)
class Piece:
    """A piece of text of one row; it may be empty, for example while a character is incomplete.

    row: number of the prompt
    text: the piece
    completion: the whole continuation of the row so far
    """

    row: int
    text: str
    completion: Completion


@dataclass(frozen=True)
class EncodedPrompt:
    """The tokens of a prompt that a model reads.

    ids: tokens, without the last one where it is given back to the model, see Tokenizer.heal
    first: tokens that may come first; empty for all
    shown: bytes of the first new token that the prompt already has
    """

    ids: list[int]
    first: list[int]
    shown: int


def complete(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    params: SamplingParams | None = None,
    *,
    mask: Mask | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Completion]:
    """Return the completion of each prompt; all are generated as one batch.

    model: the decoder
    tokenizer: the tokenizer that it was trained with
    prompts: texts, which may be empty
    params: sampling parameters; default: SamplingParams()
    mask: which tokens may come next, see generate()
    say: called with a note if only the end of a prompt is read

    Raises UsageError, UnavailableError and DivergedError as `stream_text` does.
    """
    pieces = stream_text(model, tokenizer, prompts, params, mask=mask, say=say)
    found = {piece.row: piece.completion for piece in pieces}
    return [found[row] for row in sorted(found)]


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    params: SamplingParams | None = None,
    *,
    mask: Mask | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Piece]:
    """Return an iterator over the continuations: a piece for each token, and one to end each row.

    The prompts and the parameters are checked before it returns. The random numbers of a row depend
    on its number, so that the same prompt twice gives two samples.

    model: the decoder
    tokenizer: the tokenizer that it was trained with
    prompts: texts, which may be empty
    params: sampling parameters; default: SamplingParams()
    mask: which tokens may come next, see generate()
    say: called with a note if only the end of a prompt is read

    Raises UsageError if the model cannot continue a prompt or cannot follow a parameter,
    UnavailableError if the KV cache does not fit into memory, DivergedError if the logits are not
    finite.
    """
    params = SamplingParams() if params is None else params
    encoded = [encode_prompt(model, tokenizer, prompt, say) for prompt in prompts]
    require_memory(model, len(prompts), core_options(model, params))
    return _pieces(model, tokenizer, prompts, encoded, params, mask)


def _pieces(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    encoded: list[EncodedPrompt],
    params: SamplingParams,
    mask: Mask | None,
) -> Iterator[Piece]:
    found = [Completion(prompt) for prompt in prompts]
    streams = [
        TextStream(tokenizer, params.stop, each.shown, starts=not prompt)
        for each, prompt in zip(encoded, prompts, strict=True)
    ]
    texts = [""] * len(prompts)

    def stop(row: int, new: list[int]) -> bool:
        texts[row] = streams[row].feed(new[-1])
        return streams[row].finish is not None

    ids = [each.ids for each in encoded]
    mask = _both(mask, _healing(encoded, model.config.vocab_size))
    for token in generate(model, ids, params, mask=mask, stop=stop):
        completion, stream = found[token.row], streams[token.row]
        if stream.finish != "document":  # BOS itself is not part of the text
            completion.tokens.append(token.id)
            completion.logprobs.append(token.logprob)
            completion.recurrences.append(token.recurrence)
        yield Piece(token.row, _added(completion, stream, texts[token.row]), completion)
    for row, stream in enumerate(streams):
        yield Piece(row, _added(found[row], stream, stream.flush()), found[row])


def _added(completion: Completion, stream: TextStream, text: str) -> str:
    completion.text += text
    completion.finish = stream.finish or "length"
    return text


def encode_prompt(
    model: GPT, tokenizer: Tokenizer, prompt: str, say: Callable[[str], None]
) -> EncodedPrompt:
    """Return the tokens of a prompt.

    model: the decoder
    tokenizer: the tokenizer that it was trained with
    prompt: a text, which may be empty
    say: called with a note if the context holds only the last of its tokens

    Raises UsageError if the tokenizer cannot encode the prompt.
    """
    ids = tokenizer.prompt_ids(prompt, model.config.document_mask)
    if len(ids) > model.config.seq_len:
        kept = kept_at_the_end(model)
        say(f"the prompt is {len(ids)} tokens long; only its last {kept} are read")
    return EncodedPrompt(*tokenizer.heal(ids))


def _healing(prompts: list[EncodedPrompt], vocab_size: int) -> Mask | None:
    """Return the mask of the first new tokens; None if none of the prompts needs one."""
    allowed = {}
    for row, prompt in enumerate(prompts):
        if prompt.first:
            allowed[row] = torch.zeros(vocab_size, dtype=torch.bool)
            allowed[row][torch.tensor(prompt.first)] = True
    if not allowed:
        return None
    return lambda row, new: None if new else allowed.get(row)


def _both(a: Mask | None, b: Mask | None) -> Mask | None:
    """Return the mask of the tokens that both masks allow."""
    if a is None or b is None:
        return a or b

    def mask(row: int, new: list[int]) -> torch.Tensor | None:
        found = [each for each in (a(row, new), b(row, new)) if each is not None]
        return found[0] & found[-1].to(found[0].device) if found else None

    return mask


def require_memory(model: GPT, rows: int, core: CoreOptions) -> None:
    """Raise UnavailableError if the KV cache does not fit into memory.

    model: the decoder
    rows: number of samples that are generated as one batch
    core: options of the core of a recurrent model, which decide the size of the cache
    """
    c, iterations = model.config, core.kept_iterations or 1
    copies = 2 if core.exit_rule else 1  # rows that stay in the core are copied
    layers = slots(c.depths, iterations)
    each = copies * 2 * layers * c.seq_len * c.n_kv_head * c.d_head * model.dtype.itemsize
    free = device.available_memory(model.head.weight.device)
    if free is not None and rows * each > free:
        less = f"; {parameter('recurrent_cache')} slot takes less" * (iterations > 1)
        raise UnavailableError(
            f"{rows} samples need {rows * each / 2**30:.1f} GiB of cache and "
            f"{free / 2**30:.1f} GiB are free; at most {free // each} fit{less}"
        )
