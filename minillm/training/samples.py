"""Take samples of a model while it is trained: for samples.txt, and for the screen."""

import json
from typing import TextIO

from minillm.config.sampling import SamplingParams
from minillm.errors import DivergedError, UnavailableError
from minillm.inference.complete import stream_text
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
    prompt, text, failure = t.config.sample_prompt or "", "", ""
    params = SamplingParams(max_tokens=SAMPLE_TOKENS, seed=t.config.seed)
    t.model.eval()
    with averaged(t), t.sharding.gathered(), t.meter.doing("sampling", SAMPLE_TOKENS):
        try:
            for piece in stream_text(t.model, t.corpus.tokenizer(), [prompt], params):
                text = prompt + piece.completion.text
                t.meter.tick()
        except (DivergedError, UnavailableError) as error:  # on all ranks, which do the same
            failure = f"warning   step {t.progress.step}: no sample: {error.with_flags()}"
    t.model.train()
    if failure:
        t.ranks.say(failure)
    if t.ranks.rank or failure:
        return ""
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
