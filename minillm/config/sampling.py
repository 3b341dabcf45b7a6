"""The parameters of generation, each with its default and its range.

The flags of sample.py are made from the fields, see minillm/flags/sample.py. Code that generates
takes one SamplingParams and repeats none of these defaults.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from minillm.config.fields import check_range, setting
from minillm.errors import UsageError, parameter
from minillm.runtime.cli import nearest
from minillm.runtime.terminal import decoded

MOST_ITERATIONS = 4096  # largest number of iterations of the core
EXIT_DEFAULTS = {
    "confidence": (0.9, 3),
    "kl": (5e-4, 1),
    "latent": (0.03, 1),
}  # threshold, patience


@dataclass(frozen=True)
class ExitRule:
    """When a token may leave the core early; see minillm/inference/early_exit.py.

    by: the quantity that is compared, a key of EXIT_DEFAULTS
    threshold: a probability (confidence), nats (kl) or a relative change of the state (latent)
    patience: further iterations for which the rule must hold
    """

    by: str
    threshold: float
    patience: int

    @property
    def needs_logits(self) -> bool:
        """Return whether the rule compares logits, so that the coda and the head must run."""
        return self.by != "latent"


def _usual(which: int) -> str:
    """Return the default thresholds (0) or patiences (1) in words."""
    return ", ".join(f"{name} {values[which]:g}" for name, values in EXIT_DEFAULTS.items())


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The parameters of continuing a prompt.

    The filters apply in this order: repetition penalty, temperature, top-k, top-p, min-p.

    max_tokens: largest number of new tokens
    temperature: factor of randomness; 0 takes the most likely token
    top_k: number of most likely tokens to sample from; 0 for all
    top_p: probability that the most likely tokens have together; 1 for all
    min_p: smallest probability, as a share of that of the most likely token; 0 for all
    repetition_penalty: factor against tokens that the text already has; 1 changes nothing.
        Keskar et al. 2019, arXiv:1909.05858, section 4.1
    stop: a text, or several, to end before
    seed: the random number of a token is a function of the seed, the number of the sample and the
        number of tokens that come before it in the sample

    For recurrent models:

    recurrence: iterations of the core; None for the model's mean
    recurrent_cache: "full" keeps the keys and values of every iteration, "slot" those of the last
    exit_by, exit_threshold, exit_patience: early exit, see ExitRule; prompts are read at the full
        recurrence
    warm_start: start each token from the last state of the token before it, instead of from noise
    draft_recurrence: iterations of a draft in speculative decoding; None for plain decoding

    Raises UsageError if a value is outside its range, or if two options exclude each other.
    """

    max_tokens: int = setting(
        200, "largest number of new tokens in a sample", low=1, high=10**7
    )  # fmt: skip
    temperature: float = setting(
        0.8, "factor of randomness (0: always the most likely token)", low=0
    )
    top_k: int = setting(0, "sample from the K most likely tokens (0: no limit)", low=0,
        metavar="K")  # fmt: skip
    top_p: float = setting(
        0.95, "sample from the most likely tokens that have probability P together (1: no limit)",
        low=0, high=1, above=True, metavar="P",
    )  # fmt: skip
    min_p: float = setting(
        0.0, "drop tokens less likely than P times the most likely one (0: none)",
        low=0, high=1, metavar="P",
    )  # fmt: skip
    repetition_penalty: float = setting(
        1.0, "make tokens that are already in the text less likely (1: no change)",
        low=0.01, high=100,
    )  # fmt: skip
    stop: tuple | list | str = setting(
        (), "text to end before; may be repeated", parse=decoded, metavar="TEXT", many=True
    )  # fmt: skip
    seed: int = setting(0, "random seed; the same seed gives the same text", low=0, high=2**63 - 1)

    recurrence: int | None = setting(
        None, "number of iterations of the core; fewer are faster (default: the model's mean)",
        low=1, high=MOST_ITERATIONS, metavar="R", group="recurrent models",
    )  # fmt: skip
    recurrent_cache: str = setting(
        "full", "which keys and values to keep. full: those of every iteration, which changes no "
        "token (in bf16 up to rounding); slot: only those of the last, in memory that does not "
        "grow with the iterations",
        choices=("full", "slot"),
    )  # fmt: skip
    exit_by: str | None = setting(
        None, "rule by which a token leaves the core early. Prompts are read at the full "
        "recurrence. confidence: the most likely next token is likely enough, the best rule so "
        "far. kl: the distribution hardly changes. Both cost the coda and the head in every "
        "iteration. latent: the state hardly changes (default: no early exit)",
        choices=tuple(EXIT_DEFAULTS), metavar="RULE",
    )  # fmt: skip
    exit_threshold: float | None = setting(
        None, f"threshold of the --exit-by rule (default: {_usual(0)})", low=0
    )
    exit_patience: int | None = setting(
        None, "number of further iterations for which the rule must hold "
        f"(default: {_usual(1)})",
        low=0, high=MOST_ITERATIONS,
    )  # fmt: skip
    warm_start: bool = setting(
        False, "start the iterations of each token from the last state of the token before it, "
        "which changes the text",
    )  # fmt: skip
    draft_recurrence: int | None = setting(
        None, "number of iterations of a draft in speculative decoding. Drafts are verified "
        "together at --recurrence, which gives the same text in fp32, up to rounding in bf16 "
        "(default: no drafts)",
        low=1, high=MOST_ITERATIONS, metavar="R",
    )  # fmt: skip

    @classmethod
    def of(cls, options: dict[str, Any]) -> "SamplingParams":
        """Return the parameters with these names and values.

        Raises UsageError on an unknown name, with the nearest known one.
        """
        names = [f.name for f in fields(cls)]
        if unknown := [name for name in options if name not in names]:
            raise UsageError(
                f"{unknown[0]}: no such sampling parameter; {_hint(unknown[0], names)}"
            )
        return cls(**options)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _texts(self.stop))
        for f in fields(self):
            value = getattr(self, f.name)
            check_range(f, value)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{parameter(f.name)} {value}: expected a finite number")
        if self.exit_by is None and (self.exit_threshold, self.exit_patience) != (None, None):
            unused = "exit_patience" if self.exit_threshold is None else "exit_threshold"
            raise UsageError(f"{parameter(unused)} needs {parameter('exit_by')}; add it")
        if self.exit_by == "confidence" and (self.exit_threshold or 0) > 1:
            raise UsageError(
                f"{parameter('exit_threshold')} {self.exit_threshold:g}: a confidence is a "
                "probability; expected 0 to 1"
            )
        if self.draft_recurrence is not None:
            self._refuse_with_drafts()

    def _refuse_with_drafts(self) -> None:
        others = ("exit_by", "warm_start", "recurrent_cache", "repetition_penalty")
        usual = {f.name: f.default for f in fields(self)}
        if given := [name for name in others if getattr(self, name) != usual[name]]:
            raise UsageError(
                f"{parameter('draft_recurrence')}: speculative decoding works without "
                f"{', '.join(map(parameter, given))}; drop one of them"
            )

    @property
    def exit_rule(self) -> ExitRule | None:
        """Return the rule for early exit, with its defaults filled in; None for no early exit."""
        if self.exit_by is None:
            return None
        threshold, patience = EXIT_DEFAULTS[self.exit_by]
        threshold = threshold if self.exit_threshold is None else self.exit_threshold
        patience = patience if self.exit_patience is None else self.exit_patience
        return ExitRule(self.exit_by, threshold, patience)


def _hint(name: str, names: list[str]) -> str:
    near = nearest(name, names)
    return f"did you mean {near}?" if near else f"one of: {', '.join(names)}"


def _texts(stop: Any) -> tuple[str, ...]:
    """Return the texts of `stop`, which is one text, a list of texts or None."""
    texts = () if stop is None else tuple(stop) if isinstance(stop, list | tuple) else (stop,)
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise UsageError(f"{parameter('stop')} {wrong[0]!r}: expected a text, or a list of texts")
    return texts
