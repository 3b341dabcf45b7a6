"""Save the checkpoints of one run: retry after a failure, keep the last few and the best."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from minillm.checkpoint.read import Checkpoint, verified
from minillm.checkpoint.run_folder import RunFolder
from minillm.checkpoint.schema import Progress
from minillm.checkpoint.write import discard_after, prune, save
from minillm.distributed.agreement import agree
from minillm.distributed.ranks import Ranks
from minillm.errors import CorruptError, DivergedError, MinillmError, UnavailableError

TRIES = 3  # failed attempts in a row, of which the last one ends the run
BACK = 100  # steps from a roll-back's source to the first bad step, if there is such a checkpoint
Snapshot = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]


class CheckpointKeeper:
    """Writer of the checkpoints of one run. Every rank has one and calls the same methods.

    run: folder of the run
    ranks: ranks that train it
    snapshot: returns the tensors and the state to save, as write.save takes them
    progress: progress of the run when training starts
    keep_last: number of the newest checkpoints that are kept
    keep_best: whether the one with the lowest validation loss is kept, too
    say: prints a warning
    saving: returns a context manager that is entered while a checkpoint is written
    write: write.save, or a function that takes its place in a test

    weights_are_bad: whether the last attempt found weights that are not finite. They are not saved,
    and the run has to be rolled back.
    """

    def __init__(
        self,
        run: Path,
        ranks: Ranks,
        snapshot: Callable[[], Snapshot],
        progress: Progress,
        *,
        keep_last: int = 1,
        keep_best: bool = False,
        say: Callable[[str], None] = lambda text: None,
        saving: Callable[[], AbstractContextManager] = nullcontext,
        write: Callable[..., Path] = save,
    ) -> None:
        self.run, self.ranks, self.snapshot = run, ranks, snapshot
        self.keep_last, self.keep_best = keep_last, keep_best
        self.say, self.saving, self.write = say, saving, write
        self.weights_are_bad = False
        self._failures = 0
        self._saved: tuple[int, bool] | None = None  # step and `ended` of the newest checkpoint
        self._best = progress.best_loss, progress.best_step  # best checkpoint on the disk

    def save(self, progress: Progress, final: bool = False) -> bool:
        """Save a checkpoint unless this state is saved already; return whether it is on the disk.

        If the disk is full or fails, a warning is printed, and the next attempt is the next call.
        If a weight is not finite, a warning is printed and `weights_are_bad` is set.

        progress: the progress that the snapshot holds. If a failed save would have been the best
            one, its best loss is set back to that of the best checkpoint on the disk.
        final: raise the error in either case

        Raises OSError or UnavailableError also if TRIES attempts in a row have failed.
        """
        now = (progress.step, progress.ended)
        if self._saved == now:
            return True
        try:
            with self.saving():
                self.write(self.run, progress.step, *self.snapshot(), self.ranks)
                self._prune(progress)
        except (OSError, UnavailableError) as error:
            self._failures += 1
            if final or self._failures >= TRIES:
                raise
            if self.keep_best:
                progress.best_loss, progress.best_step = self._best
            self.say(
                f"warning   step {progress.step} is not saved: {in_words(error)}; training goes on"
            )
            return False
        except DivergedError as error:
            if final:
                raise
            self.say(f"warning   {in_words(error)}")
            self.weights_are_bad = True
            return False
        self._saved, self._failures = now, 0
        self._best = progress.best_loss, progress.best_step
        return True

    def _prune(self, progress: Progress) -> None:
        if self.ranks.rank:
            return
        try:
            prune(self.run, self.keep_last, progress.best_step if self.keep_best else None)
        except OSError as error:  # the next save deletes what is left now
            self.ranks.say(f"warning   {error.filename}: not deleted: {error.strerror}")

    def roll_back_source(self, first_bad: int) -> Checkpoint | None:
        """Return the checkpoint to roll back to; None if there is no good one.

        It is the newest one BACK steps or more before step `first_bad`, else the oldest one.
        Damaged checkpoints are passed over with a warning.
        """
        for step in self._candidates(first_bad):
            try:
                return verified(RunFolder(self.run).step_folder(step), step, self.ranks)
            except CorruptError as error:
                self.say(f"warning   {in_words(error)}")
        return None

    def _candidates(self, first_bad: int) -> Iterator[int]:
        """Yield the steps of the checkpoints in the order in which they are tried."""
        steps = self.ranks.broadcast(sorted(RunFolder(self.run).checkpoints(), reverse=True))
        yield from (step for step in steps if step <= first_bad - BACK)
        yield from (step for step in reversed(steps) if step > first_bad - BACK)

    def rolled_back(self, step: int | None, progress: Progress) -> None:
        """Note that the run was rolled back, and delete the checkpoints that it will write again.

        step: step of the checkpoint that it was rolled back to; None if there was none
        progress: progress of the run there
        """
        self._saved, self.weights_are_bad = None, False
        if step is not None:
            self._best = progress.best_loss, progress.best_step
            agree(self.ranks, lambda: self.ranks.rank or discard_after(self.run, step))


def in_words(error: Exception) -> str:
    """Return the file and the reason of an error of the system, or the text of another error.

    The text is for the command line, so it names flags.
    """
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return error.with_flags() if isinstance(error, MinillmError) else str(error)
