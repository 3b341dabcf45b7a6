"""How a run is trained, and the flags of its command line.

Flags are made from the fields of ModelConfig and TrainConfig; there is no second list. How presets,
files and flags are merged stands in configure.py.
"""

import argparse
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

from minillm import cli, schedule
from minillm.config import ModelConfig, check_range, setting
from minillm.errors import UsageError
from minillm.presets import PRESETS

ALIASES = {
    "--block-size": "--seq-len",
    "--n-embd": "--d-model",
    "--max-iters": "--steps",
    "--eval-interval": "--eval-every",
    "--out-dir": "--out",
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything of a run that is not the model's shape. Lengths of time are in steps."""

    preset: str | None = setting(
        None, "named settings to start from; default: nano on a CPU, tiny on a GPU",
        choices=tuple(PRESETS), group="run",
    )  # fmt: skip
    data: str | None = setting(
        None, "file, folder or glob of text, or a prepared folder; default: the source files of "
        "this Python's standard library",
    )  # fmt: skip
    out: str | None = setting(None, "run folder; default: runs/PRESET-N")
    overwrite: bool = setting(False, "replace the run that --out names")
    init_from: str | None = setting(None, "start from this run's model, weights and tokenizer")
    seed: int = setting(1337, "of start weights, data order, dropout", low=0, high=2**63 - 1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    threads: str = setting("auto", "processor threads; auto times one against all")

    tokenizer: str = setting("bpe", "bpe, char, byte, FILE.model or FILE.json", group="data")
    val_fraction: float = setting(
        0.05, "share of the text held out: whole documents, of a single one its tail", low=0.0,
        high=0.5,
    )  # fmt: skip
    errors: str = setting("strict", "bytes that are not UTF-8", choices=("strict", "replace"))
    cache_dir: str = setting("data/prepared", "where prepared text is kept")

    optimizer: str = setting("adamw", "optimiser", choices=("adamw", "muon"), group="optimiser")
    learning_rate: float = setting(1e-3, "peak; of the matrices, with muon", low=0.0, high=10.0)
    min_learning_rate: float = setting(1e-4, "at the end", low=0.0, high=10.0)
    warmup: int = setting(100, "steps", low=0)
    schedule: str = setting("cosine", "after the warm-up", choices=schedule.KINDS)
    decay_fraction: float = setting(0.2, "share of the run that wsd decays", low=1e-3, high=1.0)
    weight_decay: float = setting(0.1, "of matrices and embeddings", low=0.0, high=10.0)
    beta1: float = setting(0.9, "AdamW", low=0.0, high=0.9999)
    beta2: float = setting(0.95, "AdamW", low=0.0, high=0.99999)
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no clipping", low=0.0)
    batch_size: int = setting(64, "sequences a step, over all ranks", low=1, high=1 << 24)
    micro_batch_size: str = setting("auto", "sequences at a time; auto: the most that fit")
    steps: int | None = setting(None, "optimiser steps; default: one epoch", low=1, high=10**9)
    epochs: float | None = setting(
        None, "passes over the data instead of --steps", low=1e-6, high=1e6
    )
    time_limit: float | None = setting(
        None, "train no longer than this, such as 90s, 10m, 2h; the schedule ends with it",
        parse=cli.duration,
    )  # fmt: skip
    ema: float = setting(0.0, "decay of the weights' average; 0: none", low=0.0, high=0.99999)
    early_stop: int = setting(0, "stop after this many evaluations without gain; 0: never", low=0)

    dtype: str = setting(
        "auto", "of the computation", choices=("auto", "fp32", "bf16"), group="precision and speed"
    )
    kernels: str = setting("auto", "table of operations", choices=("auto", "triton", "eager"))
    compile: bool = setting(False, "torch.compile the model")

    log_every: int = setting(10, "steps", low=1, group="reporting")
    eval_every: int = setting(250, "steps; 0: only at the end", low=0)
    eval_batches: int = setting(
        20, "batches of --batch-size windows in an evaluation on the way; 0: the whole split; the "
        "last evaluation is always whole", low=0,
    )  # fmt: skip
    sample_every: int = setting(0, "steps; 0: only at the end", low=0)
    save_every: int = setting(1000, "steps; 0: only at the end", low=0)
    keep_last: int = setting(2, "checkpoints to keep", low=1)
    keep_best: bool = setting(True, "keep the checkpoint of the best validation loss too")

    def __post_init__(self) -> None:
        for f in fields(self):
            check_range(f, getattr(self, f.name))
        for name in ("data", "out", "init_from", "tokenizer", "cache_dir"):
            if getattr(self, name) == "":
                raise UsageError(f"--{name.replace('_', '-')} is empty")
        if self.min_learning_rate > self.learning_rate:
            raise UsageError(
                f"--min-learning-rate {self.min_learning_rate:g} is above --learning-rate "
                f"{self.learning_rate:g}"
            )
        if self.steps is not None and self.epochs is not None:
            raise UsageError("--steps and --epochs exclude each other; give one")
        _whole_or_auto("--threads", self.threads, 4096)
        micro = _whole_or_auto("--micro-batch-size", self.micro_batch_size, self.batch_size)
        if micro and self.batch_size % micro:
            divisors = [d for d in range(1, self.batch_size + 1) if self.batch_size % d == 0]
            near = min(divisors, key=lambda d: abs(d - micro))
            raise UsageError(
                f"--micro-batch-size {micro} does not divide --batch-size {self.batch_size}; "
                f"nearest: {near}"
            )


def _whole_or_auto(flag: str, text: str, high: int) -> int | None:
    if text == "auto":
        return None
    try:
        return cli.whole(1, high)(text)
    except ArgumentTypeError as error:
        raise UsageError(f"{flag}: {error}, or auto") from None


@dataclass(frozen=True)
class Settings:
    """A resolved configuration; `given` names what the user himself set."""

    model: ModelConfig
    train: TrainConfig
    given: frozenset[str]

    def flat(self) -> dict[str, Any]:
        """Every setting by its name, as --config takes it."""
        values = {**asdict(self.model), **asdict(self.train)}
        return {name: values[name] for name in sorted(all_flags())}


def add_flags(parser: cli.Parser) -> None:
    """Give the parser one flag for each field, grouped by what it configures."""
    for f in all_flags().values():
        if "group" in f.metadata:
            group = parser.add_argument_group(f.metadata["group"])
        flag = "--" + f.name.replace("_", "-")
        text = f.metadata["help"]
        if f.default is not None and "default" not in text:
            text += f" (default: {_shown(f.default)})"
        options = {"dest": f.name, "default": None}
        if kind_of(f) is bool:
            words = {"nargs": "?", "const": True, "type": _boolean, "metavar": "true|false"}
            group.add_argument(flag, help=text, **words, **options)
            opposite = {"action": "store_const", "const": False, "help": argparse.SUPPRESS}
            group.add_argument("--no-" + flag[2:], **opposite, **options)
        else:
            what = {"type": parser_of(f), "metavar": _metavar(f)}
            group.add_argument(flag, help=text.replace("%", "%%"), **what, **options)


def _shown(default: Any) -> str:
    return {True: "yes", False: "no"}[default] if isinstance(default, bool) else str(default)


def all_flags() -> dict[str, Field]:
    """The fields that are settings, of model and training, by name."""
    return {f.name: f for owner in (ModelConfig, TrainConfig) for f in fields(owner) if f.metadata}


def kind_of(f: Field) -> type:
    """int, float, bool or str."""
    words = str(f.type.__name__ if isinstance(f.type, type) else f.type).split(" | ")
    return {"int": int, "float": float, "bool": bool, "str": str}[words[0]]


def _metavar(f: Field) -> str:
    if "choices" in f.metadata:
        return "{" + ",".join(f.metadata["choices"]) + "}"
    if "parse" in f.metadata:
        return "TIME"
    return {int: "N", float: "X", str: "TEXT"}[kind_of(f)]


def parser_of(f: Field) -> Callable[[str], Any]:
    """What turns a flag's text into the field's value, or refuses it."""
    rules = f.metadata
    if "parse" in rules:
        return rules["parse"]
    if "choices" in rules:
        return _one_of(rules["choices"])
    if kind_of(f) is int:
        return cli.whole(rules["low"], rules.get("high"))
    if kind_of(f) is float:
        return cli.real(rules["low"], rules.get("high"))
    return str


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text in choices:
            return text
        near = get_close_matches(text, choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}{hint}")

    return parse


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise ArgumentTypeError(f"{text!r} is not true or false")
