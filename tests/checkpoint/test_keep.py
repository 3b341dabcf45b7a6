"""The keeper of checkpoints, with a writer that fails on demand."""

import errno
from pathlib import Path

import pytest

from minillm.checkpoint.keep import TRIES, CheckpointKeeper
from minillm.checkpoint.schema import Progress
from minillm.distributed.ranks import Ranks
from minillm.errors import DivergedError, UnavailableError

FULL = OSError(errno.ENOSPC, "No space left on device", "here")


class Keeping:
    """A keeper whose writer raises `error` if it is set; `written` and `said` are what it did."""

    def __init__(self, progress: Progress, **options):
        self.error, self.written, self.said = None, [], []
        self.keeper = CheckpointKeeper(
            Path("run"), Ranks(), lambda: ({}, {}), progress,
            write=self.write, say=self.said.append, **options,
        )  # fmt: skip

    def write(self, run, step, tensors, state, ranks):
        if self.error:
            raise self.error
        self.written.append(step)


def test_the_same_state_is_saved_once():
    progress = Progress(step=4)
    keeping = Keeping(progress)
    assert all(keeping.keeper.save(progress) for _ in range(2)) and keeping.written == [4]
    progress.ended = True
    assert keeping.keeper.save(progress, final=True) and keeping.written == [4, 4]


@pytest.mark.parametrize("error", [FULL, UnavailableError("another rank: no space")])
def test_a_failure_is_a_warning_until_it_is_the_third_in_a_row(error):
    progress = Progress(step=1)
    keeping = Keeping(progress)
    for failures in (TRIES - 1, TRIES - 1):  # a good save in between begins the count again
        keeping.error = error
        assert [keeping.keeper.save(progress) for _ in range(failures)] == [False] * failures
        keeping.error = None
        assert keeping.keeper.save(progress)
        progress.step += 1
    assert len(keeping.said) == 2 * (TRIES - 1)
    assert all("is not saved" in line and "no space" in line.lower() for line in keeping.said)
    keeping.error = error
    for _ in range(TRIES - 1):
        keeping.keeper.save(progress)
    with pytest.raises(type(error)):
        keeping.keeper.save(progress)


def test_the_last_save_must_succeed():
    progress = Progress(step=1)
    keeping = Keeping(progress)
    for error in (FULL, DivergedError("w is not finite")):
        keeping.error = error
        with pytest.raises(type(error)):
            keeping.keeper.save(progress, final=True)
    assert not keeping.said


@pytest.mark.parametrize("keep_best, best", [(True, (2.0, 5)), (False, (1.0, 10))])
def test_a_best_that_is_not_on_the_disk_is_none(keep_best, best):
    progress = Progress(step=5, best_loss=2.0, best_step=5)
    keeping = Keeping(progress, keep_best=keep_best)
    assert keeping.keeper.save(progress)
    progress.step, progress.best_loss, progress.best_step = 10, 1.0, 10
    keeping.error = FULL
    assert not keeping.keeper.save(progress)
    assert (progress.best_loss, progress.best_step) == best


def test_weights_that_are_not_finite_ask_for_a_roll_back():
    progress = Progress(step=5)
    keeping = Keeping(progress)
    keeping.error = DivergedError("w of the model is not finite")
    assert not keeping.keeper.save(progress) and keeping.keeper.weights_are_bad
    assert keeping.said == ["warning   w of the model is not finite"]
    keeping.keeper.rolled_back(None, progress)
    assert not keeping.keeper.weights_are_bad
