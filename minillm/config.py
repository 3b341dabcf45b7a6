"""What a model is and how it is trained: two frozen configurations, checked when they are made.

ModelConfig stands in shape.py. Each field is also a flag, see settings.py; PRESETS are named
choices of them.
"""

from argparse import ArgumentTypeError
from dataclasses import dataclass, fields

from minillm import cli, schedule
from minillm.errors import UsageError
from minillm.presets import PRESETS
from minillm.setting import check_range, setting
from minillm.shape import ModelConfig, nearest_divisor

__all__ = ["PRESETS", "ModelConfig", "TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything of a run that is not the model's shape. Lengths of time are in steps."""

    # The first two end the group of flags that the model's shape began.
    recurrence_groups: int = setting(
        1, "draws of the recurrence a step: so many groups of its sequences", low=1, high=1 << 16
    )
    recurrence_curriculum: bool = setting(
        False, "the mean recurrence grows from 1 over the first quarter of the run"
    )

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
        None, "start from this run's weights, with its model's shape and its tokenizer; how often "
        "a core runs may be set anew",
    )  # fmt: skip
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
        "auto", "of the computation; fp16 scales the loss",
        choices=("auto", "fp32", "bf16", "fp16"), group="precision and speed",
    )  # fmt: skip
    kernels: str = setting("auto", "table of operations", choices=("auto", "triton", "eager"))
    compile: bool = setting(False, "torch.compile the model")
    activation_checkpointing: bool = setting(
        False, "compute blocks, or iterations of a core, again in the backward pass: less memory, "
        "a third more time",
    )  # fmt: skip

    zero: int = setting(
        0, "of the ranks that torchrun starts each keeps a share: 1 of the optimiser's state, 2 of "
        "gradients too (sent with every micro-batch, at 1 once a step), 3 of weights too",
        low=0, high=3, group="distributed",
    )  # fmt: skip
    offload: bool = setting(False, "the optimiser's state in the host's memory, at --zero 1 or 2")
    rank_timeout: float = setting(
        600.0, "seconds that a rank may keep the others waiting", low=1.0, high=1e6
    )
    hang_timeout: float | None = setting(
        None, "seconds without a sign of life after which the process shows its stacks and ends; "
        "default: 60, or five times the longest step", low=1.0, high=1e6,
    )  # fmt: skip

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
            if (given := getattr(self, name)) is not None and (not given or "\0" in given):
                what = "holds a NUL" if given else "is empty"
                raise UsageError(f"--{name.replace('_', '-')} {what}; leave it out, or name one")
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
        if self.batch_size % self.recurrence_groups:
            raise UsageError(
                f"--recurrence-groups {self.recurrence_groups} does not divide --batch-size "
                f"{self.batch_size}"
            )
        self._check_sharding()
        micro = _whole_or_auto("--micro-batch-size", self.micro_batch_size, self.batch_size)
        if micro and self.batch_size % micro:
            near = nearest_divisor(micro, self.batch_size)
            raise UsageError(
                f"--micro-batch-size {micro} does not divide --batch-size {self.batch_size}; "
                f"nearest: {near}"
            )

    def _check_sharding(self) -> None:
        if self.zero == 3 and self.optimizer == "muon":
            raise UsageError("--zero 3 cuts the matrices that muon needs whole; use --zero 2")
        if self.offload and self.zero not in (1, 2):
            raise UsageError("--offload is of --zero 1 or 2; add one, or drop it")
        if self.zero and self.ema:
            raise UsageError("--ema averages whole weights; drop it, or use --zero 0")


def _whole_or_auto(flag: str, text: str, high: int) -> int | None:
    if text == "auto":
        return None
    try:
        return cli.whole(1, high)(text)
    except ArgumentTypeError as error:
        raise UsageError(f"{flag}: {error}, or auto") from None
