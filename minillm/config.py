"""What a model is and how it is trained: two frozen configurations, checked when they are made.

Each field is also a flag, see settings.py; PRESETS are named choices of them.
"""

from argparse import ArgumentTypeError
from dataclasses import Field, dataclass, field, fields
from typing import Any

from minillm import cli, schedule
from minillm.errors import UsageError
from minillm.presets import PRESETS

__all__ = ["PRESETS", "ModelConfig", "TrainConfig", "check_range", "setting"]

POSITIONS = ("rope", "learned", "sinusoidal", "alibi", "none")
NORMS = ("rmsnorm", "layernorm")
MLPS = ("swiglu", "geglu", "gelu", "gelu-tanh", "relu2")
GATED = ("swiglu", "geglu")
INITS = ("gpt2", "zero")


def setting(default: Any, help: str, **rules: Any) -> Any:
    """A dataclass field that is also a flag: default, help, and `low`, `high` or `choices`."""
    return field(default=default, metadata={"help": help, **rules})


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. Fields left at None are derived, so that a made config has none.

    Raises UsageError, naming the flag, if the fields do not fit together.
    """

    vocab_size: int | None = setting(
        None, "tokens in the vocabulary; for bpe chosen from the corpus size if not given",
        group="model",
        low=1, high=1 << 24,
    )  # fmt: skip
    seq_len: int = setting(256, "context, in tokens", low=1, high=1 << 24)
    n_layer: int = setting(6, "blocks", low=1, high=10000)
    n_head: int = setting(6, "query heads", low=1, high=10000)
    n_kv_head: int | None = setting(
        None, "key/value heads: --n-head gives MHA, 1 MQA, between GQA; default: --n-head", low=1,
        high=10000,
    )  # fmt: skip
    d_model: int = setting(384, "width of the residual stream", low=1, high=1 << 20)
    d_head: int | None = setting(
        None, "width of a head; default: --d-model / --n-head", low=1, high=1 << 20
    )
    d_ff: int | None = setting(
        None, "width of the MLP; default: 4 x --d-model, gated: 8/3 x, up to a multiple of 64",
        low=1, high=1 << 24,
    )  # fmt: skip
    position: str = setting("rope", "how positions enter", choices=POSITIONS)
    rope_base: float = setting(10000.0, "base of the rotary frequencies", low=1.0)
    norm: str = setting("rmsnorm", "normalisation", choices=NORMS)
    norm_eps: float = setting(1e-6, "added to the variance under the root", low=0.0, high=1.0)
    mlp: str = setting("swiglu", "MLP", choices=MLPS)
    bias: bool = setting(False, "biases in linear layers and layer norms")
    qk_norm: bool = setting(False, "RMSNorm of each query and key head")
    window: int = setting(0, "sliding window, in tokens with the query's own; 0: none", low=0)
    tie_embeddings: bool = setting(False, "the head shares the embedding's matrix")
    dropout: float = setting(
        0.0, "dropout of embeddings, attention and residual branches", low=0.0, high=0.99
    )
    logit_softcap: float = setting(0.0, "logits are capped at +-this by tanh; 0: none", low=0.0)
    init: str = setting(
        "gpt2", "start weights: gpt2, or zero (output projections and head at 0)", choices=INITS
    )
    document_mask: bool = setting(False, "attention stays within a document (marked by its BOS)")
    bos_id: int | None = None  # the tokenizer's, where documents begin

    def __post_init__(self) -> None:
        for f in fields(self):
            check_range(f, getattr(self, f.name))
        if self.d_head is None:
            if self.d_model % self.n_head:
                raise UsageError(_divisor("--n-head", self.n_head, "--d-model", self.d_model))
            object.__setattr__(self, "d_head", self.d_model // self.n_head)
        if self.n_kv_head is None:
            object.__setattr__(self, "n_kv_head", self.n_head)
        if self.n_head % self.n_kv_head:
            raise UsageError(_divisor("--n-kv-head", self.n_kv_head, "--n-head", self.n_head))
        if self.d_ff is None:
            wide = -(-8 * self.d_model // 3 // 64) * 64 if self.mlp in GATED else 4 * self.d_model
            object.__setattr__(self, "d_ff", wide)
        if self.position == "rope" and self.d_head % 2:
            raise UsageError(f"--position rope needs an even --d-head; got {self.d_head}")
        if self.position == "sinusoidal" and self.d_model % 2:
            raise UsageError(f"--position sinusoidal needs an even --d-model; got {self.d_model}")
        if self.init == "zero" and self.tie_embeddings:
            raise UsageError("--init zero would zero the embedding that --tie-embeddings shares")

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies by a gate."""
        return self.mlp in GATED

    @property
    def n_matrix_parameters(self) -> int:
        """Parameters that multiply activations: the blocks' matrices and the head."""
        attention = (2 * self.n_head + 2 * self.n_kv_head) * self.d_head * self.d_model
        mlp = (3 if self.gated else 2) * self.d_ff * self.d_model
        return self.n_layer * (attention + mlp) + (self.vocab_size or 0) * self.d_model

    @property
    def n_parameters(self) -> int:
        """All parameters that are stored, tied ones once."""
        C = self.d_model
        n = self.n_matrix_parameters
        if not self.tie_embeddings:
            n += (self.vocab_size or 0) * C
        if self.position == "learned":
            n += self.seq_len * C
        heads = self.n_head + 2 * self.n_kv_head
        per_layer = 2 * self.d_head if self.qk_norm else 0
        if self.bias:
            up = 2 * self.d_ff if self.gated else self.d_ff
            per_layer += heads * self.d_head + C + up + C
        norms = (2 if self.bias and self.norm == "layernorm" else 1) * C
        return n + self.n_layer * (per_layer + 2 * norms) + norms

    def flops_per_token(self) -> float:
        """Forward and backward: 6 N + 12 L H D T.

        Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
        """
        span = min(self.seq_len, self.window or self.seq_len)
        return 6 * self.n_matrix_parameters + 12 * self.n_layer * self.n_head * self.d_head * span


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
    init_from: str | None = setting(
        None, "start from this run's weights, with its model's shape and its tokenizer"
    )
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
        20, "batches of --batch-size windows in an evaluation on the way; 0: the whole split", low=0
    )
    final_eval_batches: int = setting(0, "the same for the evaluation at the end", low=0)
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
        if self.early_stop and not (self.eval_every and self.val_fraction):
            raise UsageError("--early-stop needs --eval-every and --val-fraction above 0")
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


def check_range(f: Field, value: Any) -> None:
    """Raise UsageError if a field's value is outside what its `setting` allows."""
    rules, flag = f.metadata, "--" + f.name.replace("_", "-")
    if value is None or not rules:
        return
    if "choices" in rules and value not in rules["choices"]:
        raise UsageError(f"{flag} {value!r} is not one of {', '.join(rules['choices'])}")
    low, high = rules.get("low"), rules.get("high")
    if low is not None and not low <= value <= (high if high is not None else value):
        span = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        raise UsageError(f"{flag} {value} is out of range; expected {span}")


def _divisor(flag: str, value: int, whole_flag: str, whole: int) -> str:
    divisors = [d for d in range(1, whole + 1) if whole % d == 0]
    nearest = min(divisors, key=lambda d: (abs(d - value), -d))
    return f"{flag} {value} does not divide {whole_flag} {whole}; nearest: {nearest}"
