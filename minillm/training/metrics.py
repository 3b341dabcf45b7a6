"""Report a run while it goes on: metrics.jsonl, lines, and a bar below them on a terminal."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from minillm.runtime import console, launch
from minillm.runtime.console import Bar, Fact, View, clock
from minillm.runtime.files import write_durably
from minillm.runtime.json_text import json_text
from minillm.runtime.program import complain
from minillm.training.outlook import Outlook
from minillm.training.table import Table, speed

BATCHES = "evaluating"  # the one thing beside training whose time goes with its batches


class Meter:
    """Writer of metrics.jsonl and of the screen, on the first rank.

    On a terminal a progress bar stands below the lines; in a pipe there are the lines alone.

    path: metrics.jsonl; None: nothing is reported.
    start: the first step of this process; rows of later steps, from before a resume, are cut off.
    steps: in the run.
    flops_per_token: forward and backward.
    peak_flops: what mfu is a share of, FLOP/s.
    outlook: estimates how long the run still takes.
    lost_reader: whether what is written went to a pipe whose other end has been closed. No message
        raises an error for that.
    """

    def __init__(
        self,
        path: Path | None,
        start: int,
        steps: int,
        flops_per_token: float,
        peak_flops: float,
        outlook: Outlook | None = None,
    ) -> None:
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.path, self.warned, self.outlook = (
            path,
            False,
            Outlook() if outlook is None else outlook,
        )
        self.lost_reader = False
        if path is not None:
            _cut_after(path, start)
        self.at, self.steps, self.table = start, steps, Table()
        self.loss: float | None = None  # of the last step, which had so many tokens
        self.tokens = 0
        self.phase: _Phase | None = None
        self.since = time.perf_counter()
        self.stepped: float | None = None  # when the last step was done
        self._forget()
        shown = path is not None and console.width(sys.stderr) and launch.can_redraw_lines()
        self.bar = Bar(self._view) if shown else None

    def _forget(self) -> None:
        self.pending_steps = self.pending_tokens = 0
        self.pending_flops = 0.0

    def step(
        self,
        tokens: int,
        steps: int,
        flops_per_token: float | None = None,
        loss: float | None = None,
    ) -> None:
        """Count one step of `tokens` tokens in a run of `steps`.

        flops_per_token: of this step, where they differ from step to step.
        loss: of this step, for the bar.
        """
        each = self.flops_per_token if flops_per_token is None else flops_per_token
        self.pending_steps += 1
        self.pending_tokens += tokens
        self.pending_flops += tokens * each
        now = time.perf_counter()
        if self.stepped is not None:  # the first step of a process also pays for what happens once
            self.outlook.steps.append(now - self.stepped)
        self.at, self.steps, self.stepped = self.at + 1, steps, now
        self.loss, self.tokens = loss, tokens
        self._redraw()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the time that the `with` block takes out of the steps' times."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.since += spent
            if self.stepped is not None:
                self.stepped += spent

    @contextmanager
    def doing(self, what: str, total: int = 0, of: str | None = None) -> Iterator[None]:
        """Show in the bar what is being done instead of training, and note how long it took.

        total: how often `tick` will be called.
        of: the key of Outlook.every under which its time is noted; None: `what`.
        """
        start, before = time.perf_counter(), self.phase
        self.phase = _Phase(what, total, start, self.outlook.remaining(self.at, self.steps))
        self._redraw(now=True)
        try:
            yield
        finally:
            self.phase, spent = before, time.perf_counter() - start
            self._redraw(now=True)
        if of is None and what == BATCHES:
            self.outlook.batch = spent / max(1, total)
        else:
            self.outlook.took[of or what] = spent

    def tick(self) -> None:
        """Count one part of what `doing` shows."""
        if self.phase:
            self.phase.done += 1
            self._redraw()

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
        times = {
            "elapsed": self.outlook.elapsed(),
            "remaining": self.outlook.remaining(row["step"], self.steps),
        }
        for line in self.table.lines({**row, **times}, console.width(sys.stderr)):
            self.say(line)

    def say(self, text: str) -> None:
        """Print a line to standard error, above the bar if there is one."""
        if self.path is not None:
            self._write(text)

    def _write(self, text: str, write: Callable[..., None] = console.write) -> None:
        self.lost_reader |= not complain(text, write)

    def show_sample(self, heading: str, text: str, file: TextIO) -> None:
        """Print a text that the model wrote under its heading, which goes to standard error."""
        if self.path is not None:
            self._write(f"\n--- {heading} ---")
            self._write(text, lambda text, **_: console.write_unwrapped(text, file))
            if not text.endswith("\n"):
                self._write("")
            self.table.interrupt()

    def back_to(self, step: int) -> None:
        """Forget what was reported of later steps, which come again."""
        self._forget()
        self.at, self.stepped = step, None
        if self.path is None:
            return
        try:
            _cut_after(self.path, step)
        except OSError as error:
            self.say(f"warning   {self.path}: {error.strerror}; it holds steps that come again")

    def ending(self) -> None:
        """Note that no more steps come, though there may have been more in the schedule."""
        self.steps = self.at

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
        self.bar = None

    def _redraw(self, now: bool = False) -> None:
        if self.bar is not None:
            self.bar.redraw(now)

    def _view(self) -> View:
        """Return what the bar shows now."""
        phase, count = self.phase, f"{self.at}/{self.steps}"
        left = phase.remaining if phase else self.outlook.remaining(self.at, self.steps)
        left = left - (time.perf_counter() - phase.start) if phase and left is not None else left
        ahead = [Fact(0, f"{clock(left)} left")] if left is not None else []
        if phase:
            parts = [Fact(1, f"{phase.done}/{phase.total}")] if phase.total else []
            facts = (*parts, Fact(2, f"step {count}"), *ahead)
            return View(phase.what, min(phase.done, phase.total), phase.total, facts)
        each = self.outlook.step_s
        facts = (
            Fact(1, count),
            *([] if self.loss is None else [Fact(2, f"loss {self.loss:.3f}")]),
            *([] if each is None else [Fact(3, f"{speed(self.tokens / each)} tokens/s")]),
            *ahead,
        )
        return View(f"{self.at / self.steps:4.0%}", min(self.at, self.steps), self.steps, facts)


class _Phase:
    """What is done beside training: its name, its parts, when it began and what was left then."""

    def __init__(self, what: str, total: int, start: float, remaining: float | None) -> None:
        self.what, self.total, self.start, self.remaining = what, total, start, remaining
        self.done = 0


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
