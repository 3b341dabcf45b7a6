"""Report a run while it is trained: metrics, screen, signs of life for the watchdog."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from minillm.distributed.ranks import Ranks
from minillm.training.metrics import MetricsFile, Throughput
from minillm.training.outlook import Outlook
from minillm.training.screen import Screen
from minillm.training.watchdog import BRIEF, SAVING, Stopped, Watchdog


class Reporter:
    """Context manager that reports a run. On ranks other than the first it prints nothing.

    path: metrics.jsonl; None on ranks other than the first
    step, steps: step after which this process starts, and steps of the run
    flops_per_token: forward and backward pass, where a step does not say it
    peak_flops: FLOP/s that mfu is a share of
    outlook: estimate of the remaining time
    watchdog: notes signals, and ends the process if it stops making progress
    """

    def __init__(
        self,
        path: Path | None,
        step: int,
        steps: int,
        flops_per_token: float,
        peak_flops: float,
        outlook: Outlook | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.flops_per_token = flops_per_token
        self.outlook = Outlook() if outlook is None else outlook
        self.file = None if path is None else MetricsFile(path, step)
        self.throughput = Throughput(peak_flops)
        self.screen = Screen(path is not None, step, steps, self.outlook)
        self.watchdog = Watchdog() if watchdog is None else watchdog
        self.say, self.tick, self.doing = self.screen.say, self.screen.tick, self.screen.doing
        self.alive = self.watchdog.alive
        self._warned: set[str] = set()

    def __enter__(self) -> "Reporter":
        self.watchdog.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.watchdog.__exit__(*error)
        self.close()

    def step(
        self,
        tokens: int,
        steps: int,
        flops_per_token: float | None = None,
        loss: float | None = None,
    ) -> None:
        """Count one step of `tokens` tokens in a run of `steps`.

        tokens: tokens of the step, over all ranks
        steps: steps of the whole run
        flops_per_token: FLOPs per token of this step, if they differ from step to step
        loss: loss of this step, for the bar
        """
        each = self.flops_per_token if flops_per_token is None else flops_per_token
        self.throughput.step(tokens, each)
        self.screen.step(tokens, steps, loss)
        self.watchdog.step()

    def row(self, row: dict[str, Any]) -> None:
        """Write a row of metrics, with the speed since the last one, and print it as a line.

        A row that cannot be written (a full disk) is left out. The first time a warning says so.

        row: at least step and tokens; floats that are not finite become null
        """
        if self.file is None:
            return
        row = row | self.throughput.columns()
        try:
            self.file.write(row)
        except OSError as error:
            what = f"{self.file.path}: {error.strerror}; rows are left out meanwhile"
            self.warn_once("metrics", what)
        self.screen.row(row)

    def warn_once(self, kind: str, text: str) -> None:
        """Print a warning unless one of this kind was printed before.

        kind: name of the failure
        text: the warning, without a label
        """
        if kind not in self._warned:
            self._warned.add(kind)
            self.say(f"warning   {text}")

    def sample(self, heading: str, text: str, file: TextIO) -> None:
        """Print generated text to `file`, under a heading that goes to standard error.

        heading: line above the text
        text: the generated text
        file: stream to print to
        """
        self.screen.sample(heading, text, file)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the time of the `with` block out of the times of the steps."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.throughput.pause(spent)
            self.screen.pause(spent)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keep the time of the `with` block out of the steps; it may take longer than a step."""
        with self.paused(), self.watchdog.elsewhere(BRIEF):
            yield

    @contextmanager
    def saving_patience(self) -> Iterator[None]:
        """Let the `with` block take the time of a checkpoint: disks may be slow."""
        with self.watchdog.elsewhere(SAVING):
            yield

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Show that a checkpoint is written, and let that take its time."""
        with self.saving_patience(), self.doing("saving"):
            yield

    def back_to(self, step: int) -> None:
        """Forget what was reported of later steps, which a roll-back repeats."""
        self.throughput.reset()
        self.screen.back_to(step)
        if self.file is None:
            return
        try:
            self.file.back_to(step)
        except OSError as error:
            self.say(
                f"warning   {self.file.path}: {error.strerror}; it holds steps that come again"
            )

    def raise_if_stopped(self, ranks: Ranks) -> None:
        """Raise Stopped, on all ranks, if any was asked to end or has lost its reader."""
        self.alive()
        if self.screen.lost_reader or ranks.lost_reader:
            self.watchdog.note_lost_reader()
        if number := self.watchdog.requested_signal(ranks):
            raise Stopped(number)

    def ending(self) -> None:
        """Note that no more steps follow, even if the schedule has more."""
        self.screen.ending()

    def close(self) -> None:
        """Remove the bar."""
        self.screen.close()
