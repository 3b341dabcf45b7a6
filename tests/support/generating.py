"""Generation for tests: plain sampling from the model's distribution, unless a test says more."""

from collections.abc import Iterator
from dataclasses import fields

from minillm.config.sampling import SamplingParams
from minillm.inference.decoding_batch import Token
from minillm.inference.generate import generate
from minillm.inference.speculative import speculate

SAMPLING = {f.name for f in fields(SamplingParams)} - {"stop"}
PLAIN = {"temperature": 1.0, "top_p": 1.0}  # no filter


def split(options: dict) -> tuple[SamplingParams, dict]:
    """Return the sampling parameters among the options, and the others; `stop` is a function.

    exit_rule: an ExitRule may stand for the three parameters that it has
    """
    if rule := options.pop("exit_rule", None):
        options |= {"exit_by": rule.by, "exit_threshold": rule.threshold}
        options |= {"exit_patience": rule.patience}
    chosen = PLAIN | {name: x for name, x in options.items() if name in SAMPLING}
    return SamplingParams(**chosen), {n: x for n, x in options.items() if n not in SAMPLING}


def generated(model, prompts, **options) -> Iterator[Token]:
    """Call generate() with options by their names."""
    params, rest = split(options)
    return generate(model, prompts, params, **rest)


def speculated(model, prompts, **options) -> Iterator[Token]:
    """Call speculate() with options by their names."""
    params, rest = split(options)
    return speculate(model, prompts, params, **rest)
