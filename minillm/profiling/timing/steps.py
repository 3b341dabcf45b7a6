"""Suite `model`: time of a training step (forward, backward, clip, AdamW) by table of kernels.

A row has implementation, step_ms, spread_ms, tokens_per_s, mfu (a share of the speed of the
measured matrix product), peak_bytes (of a GPU, with weights and moments), loss (of the last of
WARMUP steps, which all start from the same weights) and note.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minillm.config.train import ModelConfig
from minillm.model.gpt import GPT
from minillm.model.size import flops_per_token, n_parameters
from minillm.ops import EAGER, Ops
from minillm.optim.build import make_optimizers, set_learning_rate
from minillm.profiling.timing.implementations import Absent, error_in_words, triton_table
from minillm.profiling.timing.operations import Effort, Row
from minillm.runtime.device import DTYPES, synchronize
from minillm.runtime.stopwatch import LEAST, MOST, summary

WARMUP = 5


@dataclass(frozen=True)
class Size:
    """A model and the batch of a step, in sequences of the model's seq_len."""

    model: ModelConfig
    batch: int


def size(kind: str, quick: bool) -> Size:
    """Return 162M parameters, GPT-2 small's width and depth, on a GPU; a small model on a CPU.

    kind: "cuda" or "cpu"
    quick: return a model of two layers on a GPU, shorter sequences on a CPU
    """
    if kind == "cuda":
        layers = 2 if quick else 12
        shape = ModelConfig(
            vocab_size=50304, seq_len=1024, n_layer=layers, n_head=12, d_model=768, qk_norm=True
        )
        return Size(shape, 16)
    shape = ModelConfig(
        vocab_size=1024, seq_len=64 if quick else 256, n_layer=2, n_head=2, d_model=128,
        qk_norm=True,
    )  # fmt: skip
    return Size(shape, 2 if quick else 4)


class Step:
    """One training step that can be called repeatedly, on one random batch."""

    def __init__(
        self, chosen: Size, ops: Ops, dtype: str, device: torch.device, compiled: bool = False
    ) -> None:
        start = torch.Generator().manual_seed(0)
        self.model = GPT(chosen.model, ops, DTYPES[dtype], start).to(device).train()
        self.forward = torch.compile(self.model) if compiled else self.model
        self.parameters = dict(self.model.named_parameters())
        self.optimizers = make_optimizers(
            "adamw", self.parameters, self.model.matrices(), ops, (0.9, 0.95), 0.1
        )
        set_learning_rate(self.optimizers, 1e-3)
        shape = (chosen.batch, chosen.model.seq_len + 1)
        tokens = torch.randint(chosen.model.vocab_size, shape, generator=start).to(device)
        self.tokens, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def __call__(self) -> torch.Tensor:
        """Take the step; return the loss before it, ()."""
        loss = self.forward(self.tokens, self.targets)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values()])
        scale = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        for optimizer in self.optimizers:
            optimizer.step(grad_scale=scale)
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def run(
    device: torch.device,
    dtype: str,
    roofs: dict[str, float],
    effort: Effort,
    quick: bool,
    say: Callable[[str], None],
) -> list[Row]:
    """Return four rows: eager, compiled, our kernels, and our kernels in a compiled model.

    device: device to measure on
    dtype: dtype of the computation, such as "bf16"
    roofs: measured ceilings of the device, see ceilings.ceilings
    effort: time for each row
    quick: measure a small model
    say: called with each line of progress
    """
    ours, chosen = triton_table(device), size(device.type, quick)
    rows = []
    for name, ops, compiled in (
        ("eager", EAGER, False),
        ("compile", EAGER, True),
        ("triton", ours, False),
        ("triton_compile", ours, True),
    ):
        say(f"model, {name}: {n_parameters(chosen.model):,} parameters, {_words(chosen)}")
        if isinstance(ops, Absent):
            rows.append(_row(name, note=ops))
        elif compiled and not effort.compiled:
            rows.append(_row(name, note="not with --quick"))
        else:
            rows.append(measured(name, chosen, ops, compiled, device, dtype, roofs, effort))
    return rows


def _words(chosen: Size) -> str:
    return f"{chosen.batch} x {chosen.model.seq_len} tokens a step"


def measured(name, chosen, ops, compiled, device, dtype, roofs, effort) -> Row:
    """Return the row of one table of kernels, or one with the reason why there are no figures.

    name: of the implementation, for the row
    chosen, ops, dtype, device, compiled: see Step
    roofs: see ceilings.ceilings
    effort: time for the row
    """
    try:
        torch.compiler.reset()
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        step = Step(chosen, ops, dtype, device, compiled)
        for _ in range(WARMUP):
            loss = step()
        seconds = _seconds(step, device, 10 * effort.seconds)
    except Exception as e:  # out of memory, no compiler: the row has the reason
        return _row(name, note=error_in_words(e))
    timing = summary(seconds)
    tokens_per_s = step.tokens.numel() / (timing.median_us / 1e6)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    flops = flops_per_token(chosen.model) * tokens_per_s
    return _row(
        name,
        step_ms=timing.median_us / 1e3,
        spread_ms=timing.spread_us / 1e3,
        tokens_per_s=tokens_per_s,
        mfu=flops / (roofs[f"{dtype}_tflops"] * 1e12),
        peak_bytes=peak,
        loss=loss.item(),
        note=f"{n_parameters(chosen.model):,} parameters, {_words(chosen)}, {dtype}",
    )


def _seconds(step: Step, device: torch.device, seconds: float) -> list[float]:
    """Return the wall-clock time of each of some steps, launches included."""
    taken: list[float] = []
    synchronize(device)
    end = time.perf_counter() + seconds
    while len(taken) < LEAST or (time.perf_counter() < end and len(taken) < MOST):
        start = time.perf_counter()
        step()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return taken


def _row(name: str, **known: Any) -> Row:
    keys = ("step_ms", "spread_ms", "tokens_per_s", "mfu", "peak_bytes", "loss")
    return {"implementation": name, **dict.fromkeys(keys), "note": "", **known}
