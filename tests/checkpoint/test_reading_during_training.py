"""Runs that are read while a training deletes their checkpoints, or that lack optimiser files."""

import shutil
from pathlib import Path

import pytest
import torch

from minillm import errors
from minillm.checkpoint import (
    find as checkpoint,
    read as reading,
    run_folder,
    sharded_safetensors as tensorfiles,
)
from minillm.checkpoint.find import load_run, open_checkpoint, while_there
from minillm.checkpoint.run_folder import RunFolder, newest_run
from minillm.checkpoint.write import prune
from minillm.errors import CorruptError
from minillm.runtime import program
from minillm.scripts import sample
from tests.support.damaging import reseal
from tests.support.thread_ranks import together, well


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """A run whose newest checkpoint is that of step 4; that of step 8 waits in `next`."""
    copy = shutil.copytree(tiny_run, tmp_path / "run")
    (copy / "checkpoints" / "step-00000008").rename(tmp_path / "next")
    return copy


def come(run: Path) -> None:
    """Save step 8 and delete step 4, as a training with --keep-last 1 does; once."""
    if (run.parent / "next").exists():
        (run.parent / "next").rename(run / "checkpoints" / "step-00000008")
        prune(run, 1, None)


PLACES = {
    "between listing and opening": (checkpoint, "verified", True),
    "after the manifest": (reading, "_check_file", True),
    "before the state": (reading, "read_state", True),
    "between the hashes and the weights": (tensorfiles, "_read_into", True),
    "between two tensors": (tensorfiles, "_read_into", False),
}


@pytest.mark.parametrize("module, name, at_once", PLACES.values(), ids=PLACES)
def test_sampling_looks_again_when_a_checkpoint_is_deleted(
    run, monkeypatch, capsys, module, name, at_once
):
    whole, calls = getattr(module, name), []

    def late(*args, **options):
        calls.append(name)
        if at_once or len(calls) == 3:
            come(run)
        return whole(*args, **options)

    monkeypatch.setattr(module, name, late)
    assert program.run("sample.py", sample.main, [str(run), "--max-tokens", "3"]) == 0
    said = capsys.readouterr().err
    assert "step 8" in said and "warning" not in said and len(said.splitlines()) == 2
    assert not (run / "checkpoints" / "step-00000004").exists()


@pytest.mark.parametrize("which", ["best", "4"])
def test_one_that_was_asked_for_is_looked_for_again(run, monkeypatch, which):
    whole = checkpoint._step_of
    shutil.copytree(run / "checkpoints" / "step-00000004", run.parent / "copy")

    def late(*args):
        come(run)
        return whole(*args)

    monkeypatch.setattr(checkpoint, "_step_of", late)
    if which == "best":
        assert open_checkpoint(run, "best", weights=True).step == 8
    else:
        with pytest.raises(errors.UsageError, match="checkpoint 4: .* holds steps 8; or last"):
            open_checkpoint(run, "4", weights=True)


def test_all_ranks_look_again_together(run, monkeypatch):
    whole = reading._check_file

    def late(path, stated):
        if path.name.startswith("ema"):
            come(run)
        return whole(path, stated)

    monkeypatch.setattr(reading, "_check_file", late)
    found = well(together(2, lambda r: while_there(run, "last", lambda it: it.step, r)))
    assert found == [8, 8]


def test_one_that_is_replaced_while_it_is_read_is_read_again(run, monkeypatch):
    """By another of the same step, as the end of a training does."""
    folder, calls = run / "checkpoints" / "step-00000004", []

    def use(found):
        calls.append(found.step)
        if len(calls) == 1:
            shutil.copytree(folder, folder.with_name("copy"))
            shutil.rmtree(folder)
            folder.with_name("copy").rename(folder)
            (folder / "manifest.json").touch()
        return len(calls)

    assert while_there(run, "last", use) == 2


def test_looking_again_has_an_end(run, monkeypatch):
    looks = []

    def fail(folder, *args):
        looks.append(folder)
        (folder / "manifest.json").touch()
        (folder / "manifest.json").rename(folder / "moved")
        shutil.copy(folder / "moved", folder / "manifest.json")
        raise CorruptError("damaged")

    monkeypatch.setattr(checkpoint, "verified", fail)
    with pytest.raises(CorruptError, match="damaged; no other checkpoint"):
        open_checkpoint(run)
    assert run_folder.TRIES <= len(looks) <= run_folder.TRIES + 1


def test_settings_and_the_newest_run_are_looked_at_again(run, monkeypatch):
    whole = run_folder.read_state

    def late(folder):
        come(run)
        return whole(folder)

    monkeypatch.setattr(run_folder, "read_state", late)
    assert "steps" in RunFolder(run).newest_settings()
    monkeypatch.undo()
    listed, calls = RunFolder.checkpoints, []

    def gone(folder):
        calls.append(folder)
        return (
            {3: folder.path / "checkpoints" / "step-00000003"}
            if len(calls) == 1
            else listed(folder)
        )

    monkeypatch.setattr(RunFolder, "checkpoints", gone)
    assert newest_run(run.parent).path == run


def without_optimizer(run: Path) -> list[Path]:
    files = sorted(run.glob("checkpoints/*/optimizer-*.safetensors"))
    for path in files:
        path.unlink()
    return files


def test_a_run_without_optimiser_files_can_be_read_but_not_resumed(
    tiny_run, train, tmp_path, capsys
):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    missing = without_optimizer(run)
    assert len(missing) == 2
    expected = dict(load_run(tiny_run)[0].named_parameters())
    for name, p in load_run(run)[0].named_parameters():
        assert torch.equal(p, expected[name])
    for which in ("last", "best", "4"):
        words = [str(run), "--checkpoint", which, "--max-tokens", "3"]
        assert program.run("sample.py", sample.main, words) == 0
    assert train("--init-from", run, "--out", tmp_path / "next", "--steps", "1") == 0
    capsys.readouterr()
    assert train("--resume", run, "--steps", "12") == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert str(missing[-1]) in line and f"start from them with --init-from {run}" in line
    assert sorted(RunFolder(run).checkpoints()) == [4, 8]  # none is put aside as damaged


def test_a_damaged_optimiser_file_does_not_keep_a_run_from_being_sampled(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for path in run.glob("checkpoints/*/optimizer-*.safetensors"):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert load_run(run)[2].d_model == 16
    with pytest.raises(CorruptError, match=r"optimizer.*; the weights of step 8 are whole"):
        open_checkpoint(run)


def test_what_is_read_is_verified(tiny_run, tmp_path):
    """Of a checkpoint that was opened for its weights nothing else can be read."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    found = open_checkpoint(run, weights=True)
    assert found.kinds == {"ema"} and found.weights == "ema"
    for kind in ("model", "optimizer"):
        with pytest.raises(CorruptError, match=f"has no {kind}-00001-of"):
            found.tensors(kind)
    path = run / "checkpoints/step-00000008/ema-00001-of-00001.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert open_checkpoint(run, weights=True, say=lambda line: None).step == 4
    path.unlink()
    reseal(path.parent)
    assert open_checkpoint(run, weights=True).kinds == {"model"}
