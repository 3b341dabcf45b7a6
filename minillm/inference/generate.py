"""Continue prompts of token ids: the loop over the model, one token of each row at a time.

The tokens of a row depend on its prompt, the seed and its sample number. They do not depend on the
other rows, or on whether a cache is used. For prompts of text see complete.py.
"""

from collections.abc import Iterator, Sequence

import torch

from minillm.config.sampling import SamplingParams
from minillm.inference.checks import check_prompts, core_options
from minillm.inference.decoding_batch import DecodingBatch, Stop, Token
from minillm.inference.draw import Mask, draw, require_finite
from minillm.inference.speculative import speculate
from minillm.model.gpt import GPT


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | None = None,
    *,
    samples: Sequence[int] | None = None,
    mask: Mask | None = None,
    stop: Stop | None = None,
    use_cache: bool = True,
) -> Iterator[Token]:
    """Continue each prompt; yield the tokens of all rows in turn as they are made.

    model: the decoder
    prompts: token ids, at least one each
    params: how to sample; default: SamplingParams(). Its texts to stop at need a tokenizer: they
        are complete.py's, and are not looked at here.
    samples: sample number of each row, on which its random numbers depend, so that row 3 of a batch
        is what samples=[3] gives alone; default: 0, 1, 2, ...
    mask: mask(row, new tokens of the row) returns which tokens may come next, (V,) bool, or None
        for all of them
    stop: stop(row, new tokens of the row) returns whether the row ends with its last token, which
        is yielded next. A row of a model with a document mask also ends with BOS.
    use_cache: False reads the whole text for every token; the tokens are the same

    Raises UsageError if a prompt is empty or has a token beyond the vocabulary, or if a parameter
    does not suit the model; DivergedError if the logits are not finite.
    """
    params = SamplingParams() if params is None else params
    check_prompts(model, prompts, samples)
    core = core_options(model, params, use_cache)
    if params.draft_recurrence is not None:
        yield from speculate(model, prompts, params, samples=samples, mask=mask, stop=stop)
        return
    batch = DecodingBatch(model, prompts, samples, params.seed, core, use_cache)
    while batch.rows:
        logits = batch.next_logits().float()  # (rows, V)
        ids = draw(batch, logits, params, mask)
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0].tolist()
        for i, row in enumerate(batch.rows):
            made, position = len(batch.new[row]), len(batch.texts[row])
            require_finite(model, logprobs[i], logits[i], row, made, position)
        for row, id, logprob, iterations in zip(
            batch.rows, ids.tolist(), logprobs, batch.iterations(), strict=True
        ):
            batch.append(row, id, params.max_tokens, stop)
            yield Token(row, id, logprob, iterations)
        batch.drop_ended()
