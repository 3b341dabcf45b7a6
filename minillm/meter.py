"""What is reported while a run goes on: metrics.jsonl, and one line a logged step."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minillm import terminal
from minillm.json_text import json_text
from minillm.storage import write_durably


class Meter:
    """Writes metrics.jsonl and the console; a progress bar on a terminal, plain lines in a pipe.

    path: metrics.jsonl; None: nothing is reported.    steps: in the run.    start: the first step
    of this process; rows of later steps, from before a resume, are cut off.
    flops_per_token: forward and backward.    peak_flops: what mfu is a share of, FLOP/s.
    """

    def __init__(
        self, path: Path | None, start: int, steps: int, flops_per_token: float, peak_flops: float
    ) -> None:
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.path, self.warned = path, False
        if path is not None:
            _cut_after(path, start)
        self.bar = tqdm(
            total=steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1,
            disable=True if path is None else None, file=sys.stderr,
        )  # fmt: skip
        self.since = time.perf_counter()
        self._forget()

    def _forget(self) -> None:
        self.pending_steps = self.pending_tokens = 0
        self.pending_flops = 0.0

    def step(self, tokens: int, steps: int, flops_per_token: float | None = None) -> None:
        """Count one step of `tokens` tokens in a run of `steps`.

        flops_per_token: of this step, where they differ from step to step.
        """
        each = self.flops_per_token if flops_per_token is None else flops_per_token
        self.pending_steps += 1
        self.pending_tokens += tokens
        self.pending_flops += tokens * each
        self.bar.total = steps
        self.bar.update(1)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside the `with` is not training: it does not count as a step's time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.since += time.perf_counter() - start

    def log(self, row: dict[str, Any]) -> None:
        """Write one object: `row` with the speed since the last call; print it as a line.

        row: at least step, tokens, loss, lr, grad_norm; floats that are not finite become null.
        A row that cannot be written (a full disk) is left out; the first time a warning says so.
        """
        if self.path is None:
            return
        if self.pending_steps:
            seconds = max(1e-9, time.perf_counter() - self.since)
            tokens_per_s = self.pending_tokens / seconds
            row = {
                **row,
                "step_ms": 1e3 * seconds / self.pending_steps,
                "tokens_per_s": tokens_per_s,
                "mfu": self.pending_flops / seconds / self.peak_flops,
            }
            self._forget()
            self.since = time.perf_counter()
        try:
            append(self.path, json_text(jsonable(row)) + "\n")
        except OSError as error:
            if not self.warned:
                self.say(f"warning   {self.path}: {error.strerror}; rows are left out meanwhile")
            self.warned = True
        if self.bar.disable:
            self.say(_line(row, self.bar.total))
        else:
            self.bar.set_postfix_str(_line(row, None), refresh=False)

    def say(self, text: str) -> None:
        """Print a line to standard error, above the bar if there is one."""
        if self.path is None:
            return
        if self.bar.disable:
            terminal.say(text)
        else:
            tqdm.write(terminal.visible(text, sys.stderr), file=sys.stderr)

    def back_to(self, step: int) -> None:
        """Forget what was reported of later steps, which come again."""
        self._forget()
        self.bar.n = step
        if self.path is None:
            return
        try:
            _cut_after(self.path, step)
        except OSError as error:
            self.say(f"warning   {self.path}: {error.strerror}; it holds steps that come again")

    def close(self) -> None:
        """Finish the bar."""
        self.bar.close()


def append(path: Path, text: str) -> None:
    """Add `text` to the end of a file. Raises OSError, having added nothing, if it does not fit."""
    rest = text.encode("utf-8")
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, 2)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):  # a torn line would spoil the next one
                file.truncate(end)
            raise


def _line(row: dict[str, Any], steps: int | None) -> str:
    parts = [f"step {row['step']:>6}/{steps}"] if steps else []
    shown = {"loss": ".4f", "val_loss": ".4f", "val_bpb": ".4f", "lr": ".2e", "grad_norm": ".2f"}
    parts += [f"{k} {row[k]:{form}}" for k, form in shown.items() if row.get(k) is not None]
    if "step_ms" in row:
        parts.append(f"{row['step_ms']:.0f} ms  {row['tokens_per_s']:,.0f} tokens/s")
    return "  ".join(parts)


def jsonable(value: Any) -> Any:
    """`value` with six digits of each number, and null for those that are not finite."""
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value


def _cut_after(path: Path, step: int) -> None:
    """Drop rows of steps beyond `step`, and a last line that a killed process left unfinished."""
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
