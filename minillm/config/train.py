"""TrainConfig: the settings of a run that do not shape its model, checked when it is created.

Each field is also a flag of train.py; flags.py makes the flags from the fields.
"""

from dataclasses import dataclass, fields

from minillm.config.fields import as_tuple, check_range, one_or_tuple, setting, whole_or_auto
from minillm.config.model import ModelConfig, nearest_divisor
from minillm.config.presets import PRESETS
from minillm.errors import UsageError, parameter
from minillm.runtime import cli
from minillm.runtime.encodings import check_encoding
from minillm.runtime.relative_paths import CACHE

__all__ = ["PRESETS", "ModelConfig", "TrainConfig"]

SCHEDULES = ("cosine", "wsd", "linear", "constant")  # implemented in optim/schedule.py


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run, except for the shape of its model. Intervals are in steps.

    A field with resumable=True may be changed by --resume. One with prepares=True says how text is
    prepared, so that a prepared folder has already fixed it.
    """

    recurrence_groups: int = setting(
        1, "groups of the batch in each step; each group draws its own number of iterations",
        low=1, high=1 << 16, group="recurrence",
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
        derived="the source files of this Python's standard library", resumable=True,
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
        metavar="NAME", resumable=True,
    )  # fmt: skip
    threads: str = setting(
        "auto", "number of processor threads (auto: one or all, whichever is faster now)",
        metavar="N", counts=True, resumable=True,
    )  # fmt: skip

    tokenizer: str = setting(
        "bpe", "tokenizer: bpe, char, byte, or a file FILE.model or FILE.json", group="data",
        metavar="NAME", is_path=True, prepares=True,
    )  # fmt: skip
    val_fraction: float = setting(
        0.05, "share of the text held out for validation, 0 to 0.5: whole documents, or the ends "
        "of large ones",
        low=0.0, high=0.5, prepares=True,
    )  # fmt: skip
    val: str | tuple | None = setting(
        None, "text files, folders or glob patterns to validate on, instead of --val-fraction; "
        "text that is in --data too is left out of training",
        metavar="PATH", many=True, is_path=True, resumable=True, prepares=True,
    )  # fmt: skip
    text_column: str = setting(
        "text",
        "column with the text of .jsonl, .json and .parquet files",
        metavar="NAME",
        prepares=True,
    )
    encoding: str = setting(
        "utf-8",
        "encoding of the text, such as cp1252 or utf-16",
        metavar="NAME",
        prepares=True,
    )
    errors: str = setting(
        "strict", "treatment of bytes that are invalid in the encoding: refuse the file, or "
        "replace them by U+FFFD",
        choices=("strict", "replace"), prepares=True,
    )  # fmt: skip
    cache_dir: str = setting(
        CACHE,
        "folder to keep prepared text in",
        metavar="DIR",
        is_path=True,
        resumable=True,
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
        metavar="N", counts=True,
    )  # fmt: skip
    steps: int | None = setting(
        None, "number of optimiser steps in the whole run, also with --resume", low=1, high=10**9,
        derived="one pass over the data", resumable=True,
    )  # fmt: skip
    epochs: float | None = setting(
        None,
        "number of passes of the whole run over the data, instead of --steps",
        low=1e-6,
        high=1e6,
        resumable=True,
    )
    time_limit: float | None = setting(
        None, "longest training time, such as 90s, 10m or 2h; the schedule ends with it; with "
        "--resume, the further training time",
        parse=cli.duration, resumable=True,
    )  # fmt: skip
    ema: float = setting(
        0.0, "decay of a moving average of the weights, such as 0.999 (0: no average)", low=0.0,
        high=0.99999,
    )  # fmt: skip
    early_stop: int = setting(
        0,
        "evaluations without a better validation loss after which to stop (0: never)",
        low=0,
        resumable=True,
    )

    dtype: str = setting(
        "auto", "number format of the computation (auto: bf16 where the device is fast at it, else "
        "fp32); fp16 scales the loss",
        choices=("auto", "fp32", "bf16", "fp16"), group="precision and speed",
    )  # fmt: skip
    kernels: str = setting(
        "auto", "implementation of the operations (auto: triton on a GPU, else eager)",
        choices=("auto", "triton", "eager"), resumable=True,
    )  # fmt: skip
    compile: bool = setting(
        False, "compile the model with torch.compile, which takes a minute", resumable=True
    )
    activation_checkpointing: bool = setting(
        False,
        "recompute each block in the backward pass: less memory, a third more time",
        resumable=True,
    )

    zero: int = setting(
        0, "ZeRO stage, which sets what is sharded over the ranks of torchrun (0: nothing; 1: "
        "optimiser state; 2: gradients too; 3: weights too). Stage 2 sends in every micro-batch, "
        "stage 1 once a step",
        low=0, high=3, group="distributed", metavar="{0,1,2,3}", resumable=True,
    )  # fmt: skip
    offload: bool = setting(
        False,
        "keep the optimiser state in the host's memory; needs --zero 1 or 2",
        resumable=True,
    )
    rank_timeout: float = setting(
        600.0, "seconds that the ranks wait for one another before they give up", low=1.0,
        high=1e6, metavar="SECONDS", resumable=True,
    )  # fmt: skip
    hang_timeout: float | None = setting(
        None, "seconds without progress after which the process prints its stacks and ends",
        derived="60, or five times the longest step", low=1.0, high=1e6, metavar="SECONDS",
        resumable=True,
    )  # fmt: skip

    log_every: int = setting(
        10, "steps from one logged line to the next", low=1, group="reporting", resumable=True
    )
    eval_every: int = setting(
        250,
        "steps from one evaluation to the next (0: only at the end)",
        low=0,
        resumable=True,
    )
    eval_batches: int = setting(
        20,
        "batches of --batch-size sequences in each evaluation (0: all validation text)",
        low=0,
        resumable=True,
    )
    final_eval_batches: int = setting(
        0,
        "batches in the evaluation at the end (0: all validation text)",
        low=0,
        resumable=True,
    )
    sample_every: int = setting(
        0, "steps from one sample to the next (0: only at the end)", low=0, resumable=True
    )
    sample_prompt: str | None = setting(
        None,
        "text that samples continue",
        metavar="TEXT",
        derived="none: they begin a document",
        resumable=True,
    )
    save_every: int = setting(
        1000,
        "steps from one checkpoint to the next (0: only at the end)",
        low=0,
        resumable=True,
    )
    keep_last: int = setting(2, "number of newest checkpoints to keep", low=1, resumable=True)
    keep_best: bool = setting(
        True, "also keep the checkpoint with the best validation loss", resumable=True
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.metadata.get("many"):
                object.__setattr__(self, f.name, one_or_tuple(getattr(self, f.name)))
            check_range(f, getattr(self, f.name))
        for name in ("data", "val", "out", "init_from", "tokenizer", "cache_dir", "text_column"):
            for given in as_tuple(getattr(self, name)) or ("",) * (getattr(self, name) == ()):
                if not given or "\0" in given:
                    what = "holds a NUL" if given else "is empty"
                    raise UsageError(f"{parameter(name)} {what}; leave it out, or name one")
        check_encoding(self.encoding)
        if self.min_learning_rate > self.learning_rate:
            raise UsageError(
                f"{parameter('min_learning_rate')} {self.min_learning_rate:g} is above "
                f"{parameter('learning_rate')} {self.learning_rate:g}"
            )
        if self.steps is not None and self.epochs is not None:
            names = f"{parameter('steps')} and {parameter('epochs')}"
            raise UsageError(f"{names} exclude each other; give one")
        if self.early_stop and not (self.eval_every and (self.val_fraction or self.val)):
            raise UsageError(
                f"{parameter('early_stop')} needs {parameter('eval_every')} and "
                f"{parameter('val_fraction')} above 0, or {parameter('val')}"
            )
        whole_or_auto("threads", self.threads, 4096)
        if self.batch_size % self.recurrence_groups:
            raise UsageError(
                f"{parameter('recurrence_groups')} {self.recurrence_groups} does not divide "
                f"{parameter('batch_size')} {self.batch_size}"
            )
        self._check_sharding()
        micro = whole_or_auto("micro_batch_size", self.micro_batch_size, self.batch_size)
        if micro and self.batch_size % micro:
            near = nearest_divisor(micro, self.batch_size)
            raise UsageError(
                f"{parameter('micro_batch_size')} {micro} does not divide "
                f"{parameter('batch_size')} {self.batch_size}; nearest: {near}"
            )

    def _check_sharding(self) -> None:
        zero = parameter("zero")
        if self.zero == 3 and self.optimizer == "muon":
            raise UsageError(f"{zero} 3 splits the matrices that muon needs whole; use {zero} 2")
        if self.offload and self.zero not in (1, 2):
            raise UsageError(f"{parameter('offload')} needs {zero} 1 or {zero} 2; add one")
        if self.zero and self.ema:
            raise UsageError(f"{parameter('ema')} averages whole weights; drop it, or use {zero} 0")
