"""Take samples of a model while it is trained: for samples.txt, and for the screen."""

import json
from typing import TextIO

from minillm.errors import DivergedError
from minillm.inference.generate import generate
from minillm.inference.text_stream import TextStream
from minillm.runtime.program import one_line
from minillm.training.metrics import append
from minillm.training.state import Training, averaged

SAMPLE_TOKENS = 200


def take_sample(t: Training) -> str:
    """Return --sample-prompt and what the model writes after it; append it to samples.txt.

    Empty where the answers are not the next tokens, and on ranks other than the first.
    """
    if t.corpus.sequence:
        return ""
    tokenizer, prompt = t.corpus.tokenizer(), t.config.sample_prompt or ""
    ids = tokenizer.prompt_ids(prompt, t.model.config.document_mask)
    ids, first, shown = tokenizer.heal(ids)
    stream, failure = TextStream(tokenizer, skip=shown), ""
    t.model.eval()
    with averaged(t), t.sharding.gathered(), t.meter.doing("sampling", SAMPLE_TOKENS):
        made = generate(
            t.model, [ids], max_tokens=SAMPLE_TOKENS, temperature=0.8, top_p=0.95,
            seed=t.config.seed, first=first, stop=lambda row, ids: stream.finish is not None,
        )  # fmt: skip
        try:
            for token in made:
                stream.feed(token.id)
                t.meter.tick()
        except DivergedError as error:  # on all ranks, as all compute the same
            failure = f"warning   step {t.progress.step}: no sample: {error}"
    t.model.train()
    if failure:
        t.ranks.say(failure)
    if t.ranks.rank or failure:
        return ""
    stream.flush()
    text = prompt + stream.text
    try:
        append(t.run / "samples.txt", f"=== {_heading(t)}\n{text}\n")
    except OSError as error:
        t.ranks.say(f"warning   {t.run}/samples.txt: {error.strerror}; this sample is left out")
    return text


def show_sample(t: Training, text: str, file: TextIO) -> None:
    """Print a sample that was just taken, if there is one, under a heading."""
    if text:
        t.meter.show_sample(f"sample at {_heading(t)}", text, file)


def _heading(t: Training) -> str:
    prompt = t.config.sample_prompt
    shown = one_line(json.dumps(prompt, ensure_ascii=False), 40)
    after = f", prompt {shown}" if prompt else ""
    return f"step {t.progress.step}{after}"
