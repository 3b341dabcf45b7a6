"""Going back to a checkpoint, where it is not plain: which one, on what schedule, what fails."""

import errno
import json
import math
import os

import pytest

from minillm.checkpoint import write as saving
from minillm.checkpoint.find import load_run, open_checkpoint
from minillm.checkpoint.read import Checkpoint
from minillm.checkpoint.run_folder import RunFolder
from minillm.training import divergence, metrics as metrics_file, recovery
from tests.support.broad import broad
from tests.training.test_recovery import FLAGS, Injector, metrics

LONG = [*FLAGS, "--save-every", "10", "--keep-last", "99", "--log-every", "50"]


def nan_from(start: int, stop: int):
    """When batches start to stop - 1 are spoilt."""
    return lambda n: math.nan if start <= n < stop else None


@pytest.mark.slow
def test_a_hundred_steps_back_if_there_is_such_a_checkpoint(train, tmp_path, monkeypatch, capfd):
    injected = Injector(nan_from(125, 140))
    assert train("--out", tmp_path / "run", *LONG, "--steps", "150", steps=injected) == 0
    assert "going on from step 20, with the text from batch 220 on" in capfd.readouterr().err
    assert injected.positions == [*range(135), *range(220, 350)]
    assert sorted(RunFolder(tmp_path / "run").checkpoints()) == list(range(10, 151, 10))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(train, tmp_path, monkeypatch, capfd):
    def when(n):
        if n == 130:
            folder = RunFolder(tmp_path / "run").checkpoints()[20]
            (folder / "model-00001-of-00001.safetensors").write_bytes(b"rotten")
        return nan_from(125, 140)(n)

    injected = Injector(when)
    assert train("--out", tmp_path / "run", *LONG, "--steps", "150", steps=injected) == 0
    err = capfd.readouterr().err
    assert "step-00000020/model-00001-of-00001.safetensors: damaged, is not" in err
    assert "going on from step 10" in err and "--checkpoint" not in err


def test_where_the_oldest_is_damaged_a_newer_one_is_taken(train, tmp_path, monkeypatch, capfd):
    def when(n):
        if n == 28:
            (RunFolder(tmp_path / "run").checkpoints()[10] / "state.json").write_bytes(b"{}")
        return nan_from(25, 60)(n)

    injected = Injector(when)
    assert train("--out", tmp_path / "run", *LONG, "--steps", "40", steps=injected) == 0
    assert "going on from step 20" in capfd.readouterr().err


@broad("limit", [[], ["--time-limit", "1h"]])
def test_a_run_that_was_made_longer_stays_so(train, tmp_path, monkeypatch, capfd, limit):
    """Its schedule is not that of the checkpoint, and its pace not that of before."""
    run = tmp_path / "run"
    assert (
        train("--out", run, *FLAGS, "--steps", "20", "--save-every", "5", "--keep-last", "9") == 0
    )
    injected = Injector(nan_from(25, 60))
    assert (
        train("--resume", run, "--steps", "60", "--save-every", "30", *limit, steps=injected) == 0
    )
    assert "going on from step 5" in capfd.readouterr().err
    assert [row["step"] for row in metrics(run)] == list(range(1, 61))
    state = open_checkpoint(run).state
    assert state["step"] == 60 and state["progress"]["ended"]


def test_what_was_saved_before_is_saved_again(train, tmp_path, monkeypatch):
    injected = Injector(nan_from(13, 60))
    flags = [*FLAGS, "--steps", "24", "--save-every", "8", "--keep-last", "9"]
    assert train("--out", tmp_path / "run", *flags, steps=injected) == 0
    past = open_checkpoint(tmp_path / "run", "16")
    assert past.state["progress"]["skipped"] == 200


def test_one_in_a_hundred_is_too_many(train, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(divergence, "RECENT", 200)
    monkeypatch.setattr(recovery, "RECORDS", 2)
    injected = Injector(lambda n: math.nan if n in (30, 40, 50) else None)
    assert train("--out", tmp_path / "run", *LONG, "--steps", "60", steps=injected) == 0
    err = capfd.readouterr().err
    assert err.count(" left out: ") == 3 and "going on from step 10" in err
    assert len((tmp_path / "run/bad-steps.jsonl").read_text().splitlines()) == 2


def test_what_the_log_cannot_do_ends_nothing(train, tmp_path, monkeypatch, capfd):
    injected = Injector(nan_from(12, 60))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*args):
        raise full

    monkeypatch.setattr(metrics_file, "write_durably", refuse)
    monkeypatch.setattr(recovery, "append", refuse)
    flags = [*FLAGS, "--save-every", "10", "--keep-last", "99", "--steps", "30"]
    assert train("--out", tmp_path / "run", *flags, steps=injected) == 0
    err = capfd.readouterr().err
    assert "metrics.jsonl: No space left on device; it holds steps that come again" in err
    assert "bad-steps.jsonl: not kept: " in err


def test_spoilt_weights_and_no_checkpoint_end_the_run(train, tmp_path, capfd):
    def spoil(state, model):
        if state.progress.step == 4:
            model.head.weight.data[0, 0] = math.inf

    flags = [*FLAGS, "--steps", "20", "--save-every", "4"]
    assert train("--out", tmp_path / "run", *flags, steps=Injector(after=spoil)) == 6
    assert "weights are not finite, and there is no checkpoint" in capfd.readouterr().err


def test_fp16_overflows_that_do_not_end_are_left_out(train, tmp_path, monkeypatch, capfd):
    """The scale is halved as long as it can be to blame; then it is a bad step as any other."""
    injected = Injector(nan_from(12, 90))
    flags = [*FLAGS, "--steps", "40", "--save-every", "4", "--keep-last", "99", "--dtype", "fp16"]
    assert train("--out", tmp_path / "run", *flags, steps=injected) == 0
    err = capfd.readouterr().err
    assert err.count(" left out: ") == 10 and "(roll-back 1 of 3)" in err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert all(row["loss"] for row in rows if "lr" in row)
    assert all(p.isfinite().all() for p in load_run(tmp_path / "run")[0].parameters())


def test_the_best_that_is_there_is_kept(train, tmp_path):
    """A better one that could not be saved does not take its place."""
    losses = {5: 3.0, 10: 1.0, 15: 2.0, 20: 2.5}

    def evaluate(setup, state, *args, **options):
        return {"val_loss": losses[state.progress.step], "val_bpb": 1.0}

    def full(run, step, *rest):
        if step == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "here")
        return saving.save(run, step, *rest)

    flags = ["--steps", "20", "--eval-every", "5", "--keep-last", "1"]
    assert train("--out", tmp_path / "run", *flags, evaluate=evaluate, write=full) == 0
    assert sorted(RunFolder(tmp_path / "run").checkpoints()) == [15, 20]
    assert open_checkpoint(tmp_path / "run", "best").step == 15


def test_an_old_checkpoint_that_cannot_be_deleted(train, tmp_path, monkeypatch, capfd):
    rename = saving.Path.rename

    def stuck(path, target):
        if ".gone." in str(target):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return rename(path, target)

    monkeypatch.setattr(saving.Path, "rename", stuck)
    flags = [*FLAGS, "--save-every", "2", "--keep-last", "1"]
    assert train("--out", tmp_path / "run", *flags) == 0
    err = capfd.readouterr().err
    assert "not deleted: Input/output error" in err and "not saved" not in err
    assert open_checkpoint(tmp_path / "run").step == 8


def test_nothing_of_the_old_optimiser_stays(train, tmp_path, monkeypatch):
    """Not where the checkpoint has no state, as one of step 0 would have none."""
    states, read = [], Checkpoint.tensors

    class Looking(Injector):
        def before_step(self, sharding):
            states.append([len(optimizer.state) for optimizer in sharding.optimizers])

    def without_state(self, kind):
        return {} if kind == "optimizer" else read(self, kind)

    monkeypatch.setattr(Checkpoint, "tensors", without_state)
    injected = Looking(nan_from(12, 60))
    assert train("--out", tmp_path / "run", *LONG, "--steps", "30", steps=injected) == 0
    back = injected.positions.index(210)  # the first batch after the roll-back
    assert all(states[back - 1]) and not any(states[back])
