"""What a model is and how it is trained: two frozen configurations, checked when they are made.

ModelConfig stands in shape.py. Each field is also a flag, see settings.py; PRESETS are named
choices of them.
"""

from argparse import ArgumentTypeError
from dataclasses import dataclass, fields

from minillm.config.fields import check_range, parts_of, setting, several
from minillm.config.model import ModelConfig, nearest_divisor
from minillm.config.presets import PRESETS
from minillm.errors import UsageError
from minillm.runtime import cli
from minillm.runtime.encodings import check_encoding

__all__ = ["PRESETS", "ModelConfig", "TrainConfig"]

SCHEDULES = ("cosine", "wsd", "linear", "constant")  # implemented in schedule.py


@dataclass(frozen=True)
class TrainConfig:
    """Everything of a run that is not the model's shape. Lengths of time are in steps."""

    # The first two end the group of flags that the model's shape began.
    recurrence_groups: int = setting(
        1, "groups of the batch in each step; each group draws its own number of iterations",
        low=1, high=1 << 16,
    )  # fmt: skip
    recurrence_curriculum: bool = setting(
        False, "raise the mean number of iterations from 1 over the first quarter of the run"
    )

    preset: str | None = setting(
        None, "named settings to start from", choices=tuple(PRESETS), group="run",
        derived="nano on a CPU, tiny on a GPU",
    )  # fmt: skip
    data: str | tuple | None = setting(
        None, "text files, folders or glob patterns, or one prepared folder, to train on",
        metavar="PATH", many=True, is_path=True,
        derived="the source files of this Python's standard library",
    )  # fmt: skip
    out: str | None = setting(
        None, "run folder to write", metavar="DIR", derived="runs/PRESET-N", is_path=True
    )
    overwrite: bool = setting(False, "replace the run in the folder that --out names")
    init_from: str | None = setting(
        None, "run whose weights to start from, with its model and its tokenizer; only the number "
        "of iterations of its core may be set again",
        metavar="RUN", is_path=True,
    )  # fmt: skip
    seed: int = setting(
        1337, "random seed for initial weights, data order and dropout", low=0, high=2**63 - 1
    )
    device: str = setting(
        "auto", "device to train on: cpu, cuda, cuda:N or mps (auto: a GPU if there is one)",
        metavar="NAME",
    )  # fmt: skip
    threads: str = setting(
        "auto", "number of processor threads (auto: one or all, whichever is faster now)",
        metavar="N",
    )  # fmt: skip

    tokenizer: str = setting(
        "bpe", "tokenizer: bpe, char, byte, or a file FILE.model or FILE.json", group="data",
        metavar="NAME", is_path=True,
    )  # fmt: skip
    val_fraction: float = setting(
        0.05, "share of the text held out for validation, 0 to 0.5: whole documents, or the ends "
        "of large ones",
        low=0.0, high=0.5,
    )  # fmt: skip
    val: str | tuple | None = setting(
        None, "text files, folders or glob patterns to validate on, instead of --val-fraction; "
        "text that is in --data too is left out of training",
        metavar="PATH", many=True, is_path=True,
    )  # fmt: skip
    text_column: str = setting(
        "text", "column with the text of .jsonl, .json and .parquet files", metavar="NAME"
    )
    encoding: str = setting(
        "utf-8", "encoding of the text, such as cp1252 or utf-16", metavar="NAME"
    )
    errors: str = setting(
        "strict", "what to do with bytes that are not of the encoding: refuse the file, or replace "
        "them by U+FFFD",
        choices=("strict", "replace"),
    )  # fmt: skip
    cache_dir: str = setting(
        "data/prepared", "folder to keep prepared text in", metavar="DIR", is_path=True
    )

    optimizer: str = setting("adamw", "optimiser", choices=("adamw", "muon"), group="optimiser")
    learning_rate: float = setting(
        1e-3, "peak learning rate; with muon, that of the matrices", low=0.0, high=10.0
    )
    min_learning_rate: float = setting(
        1e-4, "learning rate at the end; it follows --learning-rate if only that is given", low=0.0,
        high=10.0,
    )  # fmt: skip
    warmup: int = setting(100, "length of the warm-up in steps (0: none)", low=0)
    schedule: str = setting(
        "cosine", "shape of the learning rate after the warm-up", choices=SCHEDULES
    )
    decay_fraction: float = setting(
        0.2, "share of the whole run, its last part, over which the schedule wsd decays the rate; "
        "at most what the warm-up leaves", low=1e-3, high=1.0,
    )  # fmt: skip
    weight_decay: float = setting(
        0.1, "weight decay of matrices and embeddings (0: none)", low=0.0, high=10.0
    )
    beta1: float = setting(0.9, "AdamW's decay of the mean gradient", low=0.0, high=0.9999)
    beta2: float = setting(0.95, "AdamW's decay of the mean square", low=0.0, high=0.99999)
    grad_clip: float = setting(1.0, "largest norm of the gradient (0: no limit)", low=0.0)
    batch_size: int = setting(
        64, "sequences in each optimiser step, over all ranks", low=1, high=1 << 24
    )
    micro_batch_size: str = setting(
        "auto", "sequences computed at once on a rank (auto: as many as fit in memory)",
        metavar="N",
    )  # fmt: skip
    steps: int | None = setting(
        None, "number of optimiser steps in the whole run, also with --resume", low=1, high=10**9,
        derived="one pass over the data",
    )  # fmt: skip
    epochs: float | None = setting(
        None,
        "number of passes of the whole run over the data, instead of --steps",
        low=1e-6,
        high=1e6,
    )
    time_limit: float | None = setting(
        None, "longest training time, such as 90s, 10m or 2h; the schedule ends with it; with "
        "--resume, the time to train on for",
        parse=cli.duration,
    )  # fmt: skip
    ema: float = setting(
        0.0, "decay of a moving average of the weights, such as 0.999 (0: no average)", low=0.0,
        high=0.99999,
    )  # fmt: skip
    early_stop: int = setting(
        0, "evaluations without a better validation loss after which to stop (0: never)", low=0
    )

    dtype: str = setting(
        "auto", "number format of the computation (auto: bf16 where the device is fast at it, else "
        "fp32); fp16 scales the loss",
        choices=("auto", "fp32", "bf16", "fp16"), group="precision and speed",
    )  # fmt: skip
    kernels: str = setting(
        "auto", "implementation of the operations (auto: triton on a GPU, else eager)",
        choices=("auto", "triton", "eager"),
    )  # fmt: skip
    compile: bool = setting(False, "compile the model with torch.compile, which takes a minute")
    activation_checkpointing: bool = setting(
        False, "recompute each block in the backward pass: less memory, a third more time"
    )

    zero: int = setting(
        0, "what each rank of torchrun holds only a share of: 1: optimiser state; 2: gradients "
        "too; 3: weights too (0: nothing). Stage 2 sends with every micro-batch, stage 1 once a "
        "step",
        low=0, high=3, group="distributed", metavar="{0,1,2,3}",
    )  # fmt: skip
    offload: bool = setting(
        False, "keep the optimiser state in the host's memory; needs --zero 1 or 2"
    )
    rank_timeout: float = setting(
        600.0, "seconds that the ranks wait for one another before they give up", low=1.0,
        high=1e6, metavar="SECONDS",
    )  # fmt: skip
    hang_timeout: float | None = setting(
        None, "seconds without progress after which the process prints its stacks and ends",
        derived="60, or five times the longest step", low=1.0, high=1e6, metavar="SECONDS",
    )  # fmt: skip

    log_every: int = setting(10, "steps from one logged line to the next", low=1, group="reporting")
    eval_every: int = setting(
        250, "steps from one evaluation to the next (0: only at the end)", low=0
    )
    eval_batches: int = setting(
        20, "batches of --batch-size sequences in each evaluation (0: all validation text)", low=0
    )
    final_eval_batches: int = setting(
        0, "batches in the evaluation at the end (0: all validation text)", low=0
    )
    sample_every: int = setting(0, "steps from one sample to the next (0: only at the end)", low=0)
    sample_prompt: str | None = setting(
        None, "text that samples continue", metavar="TEXT", derived="none: they begin a document"
    )
    save_every: int = setting(
        1000, "steps from one checkpoint to the next (0: only at the end)", low=0
    )
    keep_last: int = setting(2, "number of newest checkpoints to keep", low=1)
    keep_best: bool = setting(True, "also keep the checkpoint with the best validation loss")

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.metadata.get("many"):
                object.__setattr__(self, f.name, several(getattr(self, f.name)))
            check_range(f, getattr(self, f.name))
        for name in ("data", "val", "out", "init_from", "tokenizer", "cache_dir", "text_column"):
            for given in parts_of(getattr(self, name)) or ("",) * (getattr(self, name) == ()):
                if not given or "\0" in given:
                    what = "holds a NUL" if given else "is empty"
                    flag = f"--{name.replace('_', '-')}"
                    raise UsageError(f"{flag} {what}; leave it out, or name one")
        check_encoding(self.encoding)
        if self.min_learning_rate > self.learning_rate:
            raise UsageError(
                f"--min-learning-rate {self.min_learning_rate:g} is above --learning-rate "
                f"{self.learning_rate:g}"
            )
        if self.steps is not None and self.epochs is not None:
            raise UsageError("--steps and --epochs exclude each other; give one")
        if self.early_stop and not (self.eval_every and (self.val_fraction or self.val)):
            raise UsageError("--early-stop needs --eval-every and --val-fraction above 0, or --val")
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
