"""Show a run on standard error: lines, and on a terminal a progress bar below them."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from minillm.runtime import console, launch
from minillm.runtime.console import Bar, Fact, View, clock
from minillm.runtime.program import complain
from minillm.training.outlook import Outlook
from minillm.training.table import Table, speed

BATCHES = "evaluating"  # the one activity besides training whose time grows with its batches


class Screen:
    """Lines and progress bar of a run. On ranks other than the first nothing is shown.

    shown: whether this rank shows anything
    step, steps: step after which this process starts, and steps of the run
    outlook: estimate of the remaining time
    lost_reader: whether what is written went to a pipe whose other end was closed. No message
        raises an error because of that.
    """

    def __init__(self, shown: bool, step: int, steps: int, outlook: Outlook) -> None:
        self.shown, self.at, self.steps, self.outlook = shown, step, steps, outlook
        self.lost_reader = False
        self.table = Table()
        self.loss: float | None = None  # loss of the last step
        self.tokens = 0  # tokens of the last step
        self.activity: _Activity | None = None
        self.stepped: float | None = None  # time at which the last step was done
        has_bar = shown and console.width(sys.stderr) and launch.can_redraw_lines()
        self.bar = Bar(self._view) if has_bar else None

    def step(self, tokens: int, steps: int, loss: float | None = None) -> None:
        """Note that one more step of a run of `steps` is done.

        steps: steps of the whole run
        tokens, loss: tokens and loss of this step, for the bar
        """
        now = time.perf_counter()
        if self.stepped is not None:  # the first step of a process includes what happens only once
            self.outlook.steps.append(now - self.stepped)
        self.at, self.steps, self.stepped = self.at + 1, steps, now
        self.loss, self.tokens = loss, tokens
        self._redraw()

    def pause(self, seconds: float) -> None:
        """Leave out a time that was not spent on steps."""
        if self.stepped is not None:
            self.stepped += seconds

    @contextmanager
    def doing(self, what: str, total: int = 0, of: str | None = None) -> Iterator[None]:
        """Show in the bar what is done instead of training, and note how long it took.

        what: name of the activity
        total: number of calls of `tick` that will follow
        of: key of Outlook.every under which its time is noted; None: `what`
        """
        start, before = time.perf_counter(), self.activity
        self.activity = _Activity(what, total, start, self.outlook.remaining(self.at, self.steps))
        self._redraw(now=True)
        try:
            yield
        finally:
            self.activity, spent = before, time.perf_counter() - start
            self._redraw(now=True)
        if of is None and what == BATCHES:
            self.outlook.batch = spent / max(1, total)
        else:
            self.outlook.took[of or what] = spent

    def tick(self) -> None:
        """Count one part of the activity that `doing` shows."""
        if self.activity:
            self.activity.done += 1
            self._redraw()

    def row(self, row: dict[str, Any]) -> None:
        """Print a row of metrics as a line of the table, with elapsed and remaining time."""
        if not self.shown:
            return
        times = {
            "elapsed": self.outlook.elapsed(),
            "remaining": self.outlook.remaining(row["step"], self.steps),
        }
        for line in self.table.lines({**row, **times}, console.width(sys.stderr)):
            self.say(line)

    def say(self, text: str) -> None:
        """Print a line to standard error, above the bar if there is one."""
        if self.shown:
            self._write(text)

    def sample(self, heading: str, text: str, file: TextIO) -> None:
        """Print generated text to `file`, under a heading that goes to standard error.

        heading: line above the text
        text: the generated text
        file: stream to print to
        """
        if self.shown:
            self._write(f"\n--- {heading} ---")
            self._write(text, lambda text, **_: console.write_unwrapped(text, file))
            if not text.endswith("\n"):
                self._write("")
            self.table.interrupt()

    def back_to(self, step: int) -> None:
        """Continue after an earlier step, as a roll-back does."""
        self.at, self.stepped = step, None

    def ending(self) -> None:
        """Note that no more steps follow, even if the schedule has more."""
        self.steps = self.at

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
        self.bar = None

    def _write(self, text: str, write: Callable[..., None] = console.write) -> None:
        self.lost_reader |= not complain(text, write)

    def _redraw(self, now: bool = False) -> None:
        if self.bar is not None:
            self.bar.redraw(now)

    def _view(self) -> View:
        """Return what the bar shows now."""
        activity, count = self.activity, f"{self.at}/{self.steps}"
        if activity:
            return activity.view(count)
        left = self.outlook.remaining(self.at, self.steps)
        each = self.outlook.step_s
        facts = (
            Fact(1, count),
            *([] if self.loss is None else [Fact(2, f"loss {self.loss:.3f}")]),
            *([] if each is None else [Fact(3, f"{speed(self.tokens / each)} tokens/s")]),
            *_time_left(left),
        )
        return View(f"{self.at / self.steps:4.0%}", min(self.at, self.steps), self.steps, facts)


class _Activity:
    """Activity besides training: its name, its parts, its start, and the time left at the start."""

    def __init__(self, what: str, total: int, start: float, remaining: float | None) -> None:
        self.what, self.total, self.start, self.remaining = what, total, start, remaining
        self.done = 0

    def view(self, count: str) -> View:
        """Return what the bar shows of it. count: steps done and all steps, in words."""
        left = self.remaining
        left = None if left is None else left - (time.perf_counter() - self.start)
        parts = [Fact(1, f"{self.done}/{self.total}")] if self.total else []
        facts = (*parts, Fact(2, f"step {count}"), *_time_left(left))
        return View(self.what, min(self.done, self.total), self.total, facts)


def _time_left(seconds: float | None) -> list[Fact]:
    return [] if seconds is None else [Fact(0, f"{clock(seconds)} left")]
