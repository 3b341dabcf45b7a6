"""Generate text from a model while it is trained, for samples.txt and for the screen."""

import json
from pathlib import Path
from typing import TextIO

from minillm.config.sampling import SamplingParams
from minillm.errors import DivergedError, UnavailableError
from minillm.inference.complete import stream_text
from minillm.runtime.program import one_line
from minillm.training.metrics import append
from minillm.training.reporter import Reporter
from minillm.training.setup import Setup
from minillm.training.state import TrainState

SAMPLE_TOKENS = SamplingParams.max_tokens  # the default of the field


def take_sample(setup: Setup, state: TrainState, report: Reporter, run: Path) -> str:
    """Generate a sample after --sample-prompt, append it to the run's samples.txt and return it.

    The text begins with the prompt. It is empty if the corpus has sequences with their own targets,
    if the model's numbers are not finite, and on ranks other than the first. Every rank calls it.

    setup: everything that is decided before the first step
    state: state of the run
    report: reporter of the run
    run: folder of the run
    """
    if setup.corpus.sequence:
        return ""
    ranks, step = setup.ranks, state.progress.step
    try:
        text = _generated(setup, state, report)
    except (DivergedError, UnavailableError) as error:  # on all ranks, which do the same
        ranks.say(f"warning   step {step}: no sample: {error.with_flags()}")
        return ""
    if ranks.rank:
        return ""
    try:
        append(run / "samples.txt", f"=== {_heading(setup, step)}\n{text}\n")
    except OSError as error:
        ranks.say(f"warning   {run}/samples.txt: {error.strerror}; this sample is left out")
    return text


def _generated(setup: Setup, state: TrainState, report: Reporter) -> str:
    prompt, text, model = setup.config.sample_prompt or "", "", setup.model
    params = SamplingParams(max_tokens=SAMPLE_TOKENS, seed=setup.config.seed)
    model.eval()
    try:
        with state.averaged(), setup.sharding.gathered(), report.doing("sampling", SAMPLE_TOKENS):
            for piece in stream_text(model, setup.corpus.tokenizer(), [prompt], params):
                text = prompt + piece.completion.text
                report.tick()
    finally:
        model.train()
    return text


def show_sample(setup: Setup, state: TrainState, report: Reporter, text: str, file: TextIO) -> None:
    """Print a sample that was just taken, if there is one, under a heading.

    setup: everything that is decided before the first step
    state: state of the run
    report: reporter of the run
    text: the generated text; nothing is printed if it is empty
    file: stream to print to
    """
    if text:
        report.sample(f"sample at {_heading(setup, state.progress.step)}", text, file)


def _heading(setup: Setup, step: int) -> str:
    """Return the heading of a sample: its step, and its prompt if there is one."""
    prompt = setup.config.sample_prompt
    shown = one_line(json.dumps(prompt, ensure_ascii=False), 40)
    return f"step {step}" + (f", prompt {shown}" if prompt else "")
