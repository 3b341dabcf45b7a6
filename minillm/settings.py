"""How a run is trained, and how a command line becomes a configuration.

Precedence: defaults < --preset < --config FILE < command line. Flags are made from the fields of
ModelConfig and TrainConfig; there is no second list.
"""

import json
import tomllib
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from minillm import cli, schedule
from minillm.config import ModelConfig, setting
from minillm.errors import UsageError
from minillm.presets import PRESETS

# What may change when a run is resumed: how it runs and reports, and how long, but not what it is.
RESUMABLE = frozenset(
    "device threads kernels compile steps epochs time_limit early_stop log_every eval_every "
    "eval_batches sample_every save_every keep_last keep_best".split()
)
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

    preset: str | None = setting(None, "named settings to start from", choices=tuple(PRESETS))
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

    tokenizer: str = setting("bpe", "bpe, char, byte, FILE.model or FILE.json")
    val_fraction: float = setting(
        0.05, "share of the text held out: whole documents, of a single one its tail", low=0.0,
        high=0.5,
    )  # fmt: skip
    errors: str = setting("strict", "bytes that are not UTF-8", choices=("strict", "replace"))
    cache_dir: str = setting("data/prepared", "where prepared text is kept")

    optimizer: str = setting("adamw", "optimiser", choices=("adamw", "muon"))
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
    epochs: float | None = setting(None, "passes over the data instead of --steps", low=1e-6)
    time_limit: float | None = setting(
        None, "train no longer than this, such as 90s, 10m, 2h; the schedule ends with it",
        parse=cli.duration,
    )  # fmt: skip
    ema: float = setting(0.0, "decay of the weights' average; 0: none", low=0.0, high=0.99999)
    early_stop: int = setting(0, "stop after this many evaluations without gain; 0: never", low=0)

    dtype: str = setting("auto", "of the computation", choices=("auto", "fp32", "bf16"))
    kernels: str = setting("auto", "table of operations", choices=("auto", "triton", "eager"))
    compile: bool = setting(False, "torch.compile the model")

    log_every: int = setting(10, "steps", low=1)
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
        return {name: values[name] for name in sorted(_flags())}


def changed(model: ModelConfig, train: TrainConfig, settings: Settings) -> Settings:
    """The settings of a run to resume, with what `settings.given` may change of them.

    Raises UsageError, naming the flag, on a given setting that a resumed run cannot change.
    """
    wishes = {}
    for name in sorted(settings.given):
        if name not in RESUMABLE:
            old = getattr(train, name, None) if hasattr(train, name) else getattr(model, name)
            new = settings.flat()[name]
            if new != old:
                raise UsageError(
                    f"--{name.replace('_', '-')} {new} differs from the run's {old} and cannot "
                    "change on --resume; start anew with --init-from"
                )
        else:
            wishes[name] = getattr(settings.train, name)
    if wishes.keys() & {"steps", "epochs", "time_limit"}:
        wishes = {"steps": None, "epochs": None, "time_limit": None, **wishes}
    return Settings(model, replace(train, **wishes), settings.given)


def add_flags(parser: cli.Parser) -> None:
    """Give the parser one flag for each field, grouped by what it configures."""
    for title, owner in (("model", ModelConfig), ("training", TrainConfig)):
        group = parser.add_argument_group(title)
        for f in fields(owner):
            if not f.metadata:
                continue
            flag = "--" + f.name.replace("_", "-")
            default = "" if f.default is None or "default" in f.metadata["help"] else f.default
            text = f.metadata["help"] + (f" (default: {default})" if default != "" else "")
            options = {"dest": f.name, "default": None, "help": text.replace("%", "%%")}
            if f.type is bool or f.type == "bool":
                group.add_argument(flag, nargs="?", const=True, type=_boolean, **options)
                options["help"] = f"the opposite of {flag}"
                group.add_argument(
                    "--no-" + flag[2:], action="store_const", const=False, **options
                )
            else:
                parse, metavar = _parser_of(f), _metavar(f)
                group.add_argument(flag, type=parse, metavar=metavar, **options)


def resolve(
    flags: dict[str, Any], config_file: str | None, default_preset: str | None
) -> Settings:
    """Merge the layers. flags: name -> value, None where the user gave none.

    Raises UsageError on an unknown key, a wrong type or settings that do not fit together.
    """
    given = {name: value for name, value in flags.items() if name in _flags() and value is not None}
    from_file = read_config(Path(config_file)) if config_file else {}
    preset = given.get("preset") or from_file.get("preset") or default_preset
    values = {**(PRESETS[preset] if preset else {}), **from_file, **given, "preset": preset}
    # What the user says about the length replaces all that the preset says about it.
    lengths = ("steps", "epochs", "time_limit")
    if any(name in given or name in from_file for name in lengths):
        for name in lengths:
            if name not in given and (name not in from_file or any(n in given for n in lengths)):
                values[name] = None
    if "learning_rate" in values and "min_learning_rate" not in {**from_file, **given}:
        # The end follows the peak, in the proportion that the preset or the default has.
        base = {"learning_rate": 1e-3, "min_learning_rate": 1e-4, **PRESETS.get(preset, {})}
        share = base["min_learning_rate"] / base["learning_rate"]
        values["min_learning_rate"] = share * values["learning_rate"]
    model_names = {f.name for f in fields(ModelConfig)}
    model = ModelConfig(**{n: v for n, v in values.items() if n in model_names})
    train = TrainConfig(**{n: v for n, v in values.items() if n not in model_names})
    return Settings(model, train, frozenset(given) | frozenset(from_file))


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a .toml or .json file: one flat table, names with dashes or underscores.

    Raises UsageError, naming file and key, on what is not a setting or not of its type.
    """
    raw = _parse_file(path)
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: expected one table of settings, got {type(raw).__name__}")
    settings: dict[str, Any] = {}
    for key, value in raw.items():
        flag = "--" + key.replace("_", "-")
        name = ALIASES.get(flag, flag)[2:].replace("-", "_")
        if name not in _flags():
            near = get_close_matches(name, _flags(), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"{path}: unknown setting {key!r}{hint}")
        if name in settings:
            raise UsageError(f"{path}: {name} is given twice")
        if value is not None:
            settings[name] = _typed(path, key, value, _flags()[name])
    return settings


def _parse_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"--config {path}: no such file")
    if path.stat().st_size > 1 << 20:
        raise UsageError(f"--config {path}: larger than 1 MiB; is this a configuration?")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".toml":
            return tomllib.loads(text)
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_refuse_repeats, parse_constant=_refuse_nan)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    raise UsageError(f"--config {path}: expected a .toml or .json file")


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return table


def _refuse_nan(text: str) -> None:
    raise ValueError(f"{text} is not a finite number")


def _typed(path: Path, key: str, value: Any, f: Field) -> Any:
    kind = _kind(f)
    if f.name in ("threads", "micro_batch_size") and type(value) is int:
        value = str(value)
    if f.name == "time_limit" and type(value) in (int, float):
        value = str(value)
    fits = type(value) is kind or (kind is float and type(value) in (int, str) and (
        type(value) is int or "parse" in f.metadata))  # fmt: skip
    if not fits:
        raise UsageError(
            f"{path}: {key} = {json.dumps(value)} is a {type(value).__name__}, "
            f"expected a {kind.__name__}"
        )
    if kind in (bool, str) and "choices" not in f.metadata:
        return value
    try:
        return _parser_of(f)(str(value))
    except ArgumentTypeError as error:
        raise UsageError(f"{path}: {key}: {error}") from None


def _flags() -> dict[str, Field]:
    return {f.name: f for owner in (ModelConfig, TrainConfig) for f in fields(owner) if f.metadata}


def _kind(f: Field) -> type:
    words = str(f.type.__name__ if isinstance(f.type, type) else f.type).split(" | ")
    return {"int": int, "float": float, "bool": bool, "str": str}[words[0]]


def _metavar(f: Field) -> str:
    if "choices" in f.metadata:
        return "{" + ",".join(f.metadata["choices"]) + "}"
    if "parse" in f.metadata:
        return "TIME"
    return {int: "N", float: "X", str: "TEXT"}[_kind(f)]


def _parser_of(f: Field) -> Callable[[str], Any]:
    rules = f.metadata
    if "parse" in rules:
        return rules["parse"]
    if "choices" in rules:
        return _one_of(rules["choices"])
    if _kind(f) is int:
        return cli.whole(rules["low"], rules.get("high"))
    if _kind(f) is float:
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
