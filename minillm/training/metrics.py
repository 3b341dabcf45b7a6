"""Metrics of a training: the measurements of a step, metrics.jsonl, and the speed."""

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.runtime.files import write_durably
from minillm.runtime.json_text import json_text


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Measurements of one step, whether it was taken or skipped.

    step: number of the step, the first is 1
    tokens: tokens of all steps so far, over all ranks
    batch_tokens: tokens of this step, over all ranks
    loss: mean loss, nats per token
    learning_rate: learning rate of the step
    grad_norm: norm of the gradient, before clipping
    peak_memory_mib: peak memory of this process; None if the system does not say
    flops_per_token: forward and backward pass
    loss_scale: scale of the loss; None unless the dtype is fp16
    recurrence: mean recurrence of the sequences; None without recurrent depth
    """

    step: int
    tokens: int
    batch_tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    peak_memory_mib: float | None
    flops_per_token: float
    loss_scale: float | None = None
    recurrence: float | None = None

    def row(self) -> dict[str, Any]:
        """Return the row of metrics.jsonl."""
        row = {
            "step": self.step, "tokens": self.tokens, "loss": self.loss, "lr": self.learning_rate,
            "grad_norm": self.grad_norm, "peak_memory_mib": self.peak_memory_mib,
        }  # fmt: skip
        optional = {"loss_scale": self.loss_scale, "recurrence": self.recurrence}
        return row | {name: value for name, value in optional.items() if value is not None}


class MetricsFile:
    """Writer of metrics.jsonl.

    path: the file
    step: step after which this process starts; rows of later steps, from before a resume, are cut
        off
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        _cut_after(path, step)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; raise OSError, having written nothing, if it cannot be written.

        row: floats that are not finite become null
        """
        append(self.path, json_text(jsonable(row)) + "\n")

    def back_to(self, step: int) -> None:
        """Cut off the rows of steps after `step`; raise OSError if that fails."""
        _cut_after(self.path, step)


class Throughput:
    """Speed of training since the last row.

    peak_flops: FLOP/s that mfu is a share of
    """

    def __init__(self, peak_flops: float) -> None:
        self.peak_flops = peak_flops
        self.since = time.perf_counter()
        self.reset()

    def reset(self) -> None:
        """Forget the steps since the last row."""
        self.steps = self.tokens = 0
        self.flops = 0.0

    def step(self, tokens: int, flops_per_token: float) -> None:
        """Count one step of `tokens` tokens.

        tokens: tokens of the step, over all ranks
        flops_per_token: FLOPs of forward and backward pass
        """
        self.steps += 1
        self.tokens += tokens
        self.flops += tokens * flops_per_token

    def pause(self, seconds: float) -> None:
        """Leave out a time that was not spent on steps."""
        self.since += seconds

    def columns(self) -> dict[str, float]:
        """Return step_ms, tokens_per_s and mfu since the last call; nothing without a step."""
        if not self.steps:
            return {}
        seconds = max(1e-9, time.perf_counter() - self.since)
        found = {
            "step_ms": 1e3 * seconds / self.steps,
            "tokens_per_s": self.tokens / seconds,
            "mfu": self.flops / seconds / self.peak_flops,
        }
        self.reset()
        self.since = time.perf_counter()
        return found


def append(path: Path, text: str) -> None:
    """Append `text` to a file. Raises OSError, having added nothing, if it does not fit.

    path: the file
    text: text that is added at its end
    """
    rest = text.encode("utf-8")
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, 2)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):  # half a line would spoil the next one
                file.truncate(end)
            raise


def jsonable(value: Any) -> Any:
    """Return `value` with six digits of each float, and None for floats that are not finite."""
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value


def _cut_after(path: Path, step: int) -> None:
    """Cut off rows of steps after `step`, and a last line that a killed process left unfinished."""
    if not path.exists():
        return
    kept, text = [], path.read_bytes()
    for line in text.decode("utf-8", "replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    data = "".join(kept).encode("utf-8")
    if data != text:
        write_durably(path, data)
