"""Run folders: which is the newest, where a new one may go, and who gets it."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from minillm.checkpoint import placing, run_folder
from minillm.checkpoint.find import load_run
from minillm.checkpoint.run_folder import RunFolder, newest_run, run_of_launch
from minillm.checkpoint.write import save
from minillm.errors import UsageError
from minillm.runtime import program
from minillm.runtime.files import write_json
from minillm.scripts import sample
from minillm.training.gradients import accumulate
from minillm.training.steps import steps

CONFIG = {"model": {}, "train": {}, "tokenizer_sha256": ""}  # enough for a folder to be a run


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """A copy of the finished run, to damage."""
    return shutil.copytree(tiny_run, tmp_path / "run")


def test_the_newest_run_has_the_newest_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="no run with a checkpoint in .*train.py"):
        newest_run(tmp_path / "runs")
    for when, name in ((3, "b"), (9, "a"), (5, "c")):
        folder = save(tmp_path / name, 1, {}, {})
        write_json(tmp_path / name / "config.json", CONFIG)
        os.utime(folder, ns=(when * 10**9, when * 10**9))
    (tmp_path / "d").mkdir()
    (tmp_path / "e").write_text("")
    assert newest_run(tmp_path).path == tmp_path / "a"


def test_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert placing.make_run(None, "nano", False)[0] == Path("runs/nano-1")
    (tmp_path / "runs" / "nano-2").write_text("")
    assert placing.make_run(None, "nano", False)[0] == Path("runs/nano-3")
    assert [path.name for path in Path("runs/nano-3").iterdir()] == ["lock"]


def test_where_a_run_may_go(tmp_path, run):
    placing.check_out(tmp_path / "new", False)
    (tmp_path / "empty").mkdir()
    placing.check_out(tmp_path / "empty", False)
    placing.check_out(run, True)
    with pytest.raises(
        UsageError, match=r"exists; continue it with .* --resume .*, or replace it with over"
    ):
        placing.check_out(run, False)
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="holds other things than a run"):
            placing.check_out(run / "checkpoints", overwrite)
        with pytest.raises(UsageError, match="is a file; name a folder"):
            placing.check_out(run / "config.json", overwrite)
    placing.make_run(str(run), "nano", True)
    assert [path.name for path in run.iterdir()] == ["lock"]


def overtaken(monkeypatch, name: str) -> None:
    """Let another process make the folder `name` just before this one does."""
    mkdir, made = Path.mkdir, []

    def slow_mkdir(path, *args, **options):
        if path.name == name and not made:
            made.append(path)
            mkdir(path, parents=True)
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", slow_mkdir)


def test_who_comes_second_gets_the_next_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overtaken(monkeypatch, "nano-1")
    assert placing.make_run(None, "nano", False)[0] == Path("runs/nano-2")


@pytest.mark.parametrize("overwrite", [False, True])
def test_who_comes_second_for_a_name_is_refused(tmp_path, overwrite):
    """Also between the first one's making of the folder and its first file."""
    run, held = placing.make_run(str(tmp_path / "mine"), "nano", False)
    if held is None:
        pytest.skip("no locks here")
    with held, pytest.raises(UsageError, match="mine is being written by "):
        placing.make_run(str(run), "nano", overwrite)


def test_what_another_has_begun_meanwhile_is_seen(tmp_path, monkeypatch):
    """The first was quicker, and is through, when the second gets the lock."""
    run, lock = tmp_path / "mine", placing.lock

    def late(path):
        write_json(path / "config.json", CONFIG)
        return lock(path)

    monkeypatch.setattr(placing, "lock", late)
    with pytest.raises(UsageError, match="mine exists; continue it with "):
        placing.make_run(str(run), "nano", False)
    assert (run / "config.json").exists()


def test_many_at_once_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    together = threading.Barrier(16)

    def claim(_):
        together.wait()
        return placing.make_run(None, "nano", False)[0]

    with ThreadPoolExecutor(16) as pool:
        claimed = sorted(pool.map(claim, range(16)), key=lambda p: int(p.name[5:]))
    assert claimed == [Path(f"runs/nano-{n}") for n in range(1, 17)]


def test_a_run_that_ended_before_its_first_checkpoint(train, tmp_path, monkeypatch, capfd):
    """It can be gone on with, from its first step, and is as if nothing had happened."""
    run = tmp_path / "runs" / "early"
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return accumulate(*args)

    assert train("--out", run, steps=partial(steps, accumulate=interrupted)) == 130
    assert (run / "config.json").is_file() and not RunFolder(run).checkpoints()

    def said() -> str:
        return capfd.readouterr().err.splitlines()[-1]

    assert train("--out", run) == 2
    assert said().endswith(
        f"exists; continue it with python train.py --resume {run}, or replace it with --overwrite"
    )
    assert program.run("sample.py", sample.main, [str(run)]) == 2
    assert said() == (
        f"sample.py: error: {run} holds no checkpoint yet; train on: python train.py --resume {run}"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no run with a checkpoint in runs/"):
        newest_run()
    assert train("--resume") == 0
    assert newest_run().path == Path("runs/early")
    assert train("--out", tmp_path / "whole") == 0
    for a, b in zip(*(load_run(r)[0].parameters() for r in (run, tmp_path / "whole")), strict=True):
        assert torch.equal(a, b)


def test_one_process_writes_a_run_at_a_time(tmp_path):
    """A lock goes with the file that holds it, so that a process that dies leaves none."""
    run = tmp_path / "run"
    run.mkdir()
    held = placing.lock(run)
    by = os.getpid() if Path("/proc/locks").is_file() else "another process"
    with pytest.raises(UsageError, match=f"is being written by (process {by}|another process);"):
        placing.lock(run)
    held.close()
    placing.lock(run).close()


def test_a_launch_knows_its_own_run(tmp_path, monkeypatch):
    """By the name in config.json; what another has begun is never replaced."""
    monkeypatch.chdir(tmp_path)
    for name, launch, done in (("a", "x", True), ("b", "y", True), ("c", "x", False)):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        write_json(run / "config.json", {**CONFIG, "launch": launch})
        if done:
            (run / "checkpoints" / "step-00000004").mkdir(parents=True)
            (run / "checkpoints" / "step-00000004" / "manifest.json").touch()
    assert run_of_launch("x", None).path == Path("runs/a") and run_of_launch(
        "y", None
    ).path == Path("runs/b")
    assert run_of_launch("x", "runs/b") is run_of_launch("x", "runs/c") is None
    assert run_of_launch(None, None) is None
    placing.check_out(Path("runs/c"), False, "x")  # its own, without a checkpoint: it begins anew
    for name, launch in (("a", "x"), ("b", "x"), ("c", "y"), ("c", None)):
        with pytest.raises(UsageError, match="exists; "):
            placing.check_out(Path("runs") / name, False, launch)


def test_config_json_is_read_once_and_again_after_it_is_written(run, monkeypatch):
    files, read = [], run_folder.read_json

    def counted(path):
        files.append(path)
        return read(path)

    monkeypatch.setattr(run_folder, "read_json", counted)
    found = RunFolder(run)
    assert files == [] and str(found) == str(run) and Path(found) == run
    facts = found.facts | {"dtype": "fp32", "threads": 1, "micro_batch_size": 4, "ranks": 1}
    assert found.model.d_model == 16 and found.train["steps"] == 8 and found.data_order == 2
    assert found.tokenizer().sha256 == facts["tokenizer_sha256"] and found.corpus_places()
    assert found.fixed["threads"] == found.config["threads"]
    assert files == [run / "config.json"]
    extra = {name: x for name, x in facts.items() if name not in ("model", "train", "sha256")}
    found.write_config(found.model, found.train | {"steps": 9}, extra)
    assert found.train["steps"] == 9 and found.fixed["micro_batch_size"] == 4
    assert files == [run / "config.json"] * 2
