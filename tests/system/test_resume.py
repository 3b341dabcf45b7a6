"""Going on with a run: what it keeps, what may change, and where its text may have gone."""

import json
import shutil
from pathlib import Path

import pytest

from minillm.checkpoint import placing
from minillm.checkpoint.find import open_checkpoint
from minillm.checkpoint.run_folder import RunFolder
from minillm.training import samples
from tests.support.broad import broad

MODEL, AVERAGE = "model-00001-of-00001.safetensors", "ema-00001-of-00001.safetensors"


def metrics(run: Path, key: str = "loss") -> dict[int, float]:
    """step -> value, of the rows of metrics.jsonl that have `key`."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in rows if key in row}


def break_off(run: Path, step: int) -> None:
    """As if the process had been killed after the checkpoint of `step`."""
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    assert open_checkpoint(run).step == step


def weights(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step-{step:08d}" / MODEL).read_bytes()


def test_a_new_length_outlives_a_break(train, tmp_path, capfd):
    """What --resume changed need not be said again, and changes nothing but that."""
    flags = ["--schedule", "cosine", "--optimizer", "adamw", "--learning-rate", "0.01"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert train("--out", straight, "--steps", "4", *flags) == 0
    longer = ["--steps", "16", "--save-every", "5", "--keep-last", "9", "--eval-every", "6"]
    assert train("--resume", straight, *longer) == 0
    shutil.copytree(straight, broken)
    break_off(broken, 10)
    assert open_checkpoint(broken).state["settings"]["steps"] == 16
    assert train("--resume", broken) == 0
    assert open_checkpoint(broken).step == 16
    assert weights(broken, 16) == weights(straight, 16)
    for key in ("loss", "lr", "val_loss"):
        assert metrics(broken, key) == metrics(straight, key)
    # The new --save-every and --eval-every were kept, too.
    assert (broken / "checkpoints" / "step-00000015").is_dir()
    assert set(metrics(broken, "val_loss")) == {4, 6, 12, 16}


@pytest.mark.parametrize("length", [["--epochs", "0.3"], ["--time-limit", "1h", "--steps", "9"]])
def test_a_new_length_replaces_the_old_one(train, tmp_path, length):
    assert train("--out", tmp_path / "run", "--steps", "4") == 0
    assert train("--resume", tmp_path / "run", *length) == 0
    assert open_checkpoint(tmp_path / "run").step > 4
    settings = open_checkpoint(tmp_path / "run").state["settings"]
    wishes = {name: settings[name] for name in ("steps", "epochs", "time_limit")}
    if "--epochs" in length:
        assert wishes == {"steps": None, "epochs": 0.3, "time_limit": None}
    else:
        assert wishes == {"steps": 9, "epochs": None, "time_limit": 3600.0}


@broad("schedule", ["cosine", "wsd", "linear"])
def test_a_new_length_has_its_own_schedule(train, tmp_path, schedule):
    """From the checkpoint on the rates are those of a run which was meant to be so long."""
    flags = ["--schedule", schedule, "--warmup", "2", "--learning-rate", "0.01"]
    assert train("--out", tmp_path / "long", "--steps", "14", *flags) == 0
    assert train("--out", tmp_path / "short", "--steps", "5", *flags) == 0
    assert train("--resume", tmp_path / "short", "--steps", "14") == 0
    long, short = (metrics(tmp_path / name, "lr") for name in ("long", "short"))
    assert {s: r for s, r in short.items() if s > 5} == {s: r for s, r in long.items() if s > 5}
    assert short[5] < long[5]


def test_a_finished_run_says_so_and_is_left_alone(train, tmp_path, tiny_run, capfd):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    capfd.readouterr()
    assert train("--resume", run) == 0
    said = capfd.readouterr()
    assert said.err.splitlines()[-1] == (
        f"{run} is finished at step 8; train on: python train.py --resume {run} --steps N"
    )
    assert said.out == "" and before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}


def test_text_that_moved_is_named_with_data(train, tmp_path, text_file, capfd):
    """The prepared text is gone and the raw one is elsewhere: the tokens decide, not the paths."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    here, there = tmp_path / "here.txt", tmp_path / "there.txt"
    shutil.copy(text_file, here)
    assert train("--out", run, "--data", here, "--cache-dir", cache, "--tokenizer", "bpe") == 0
    other = tmp_path / "other.txt"
    other.write_text("something else entirely, of another length. " * 99)
    capfd.readouterr()
    # What --data names counts, even where the prepared text still is.
    assert train("--resume", run, "--steps", "9", "--data", other) == 2
    assert f"the text is not what {run} was trained on" in capfd.readouterr().err
    shutil.rmtree(cache)
    here.rename(there)
    assert train("--resume", run, "--steps", "9") == 2
    assert "if the text has moved, say where with --data" in capfd.readouterr().err
    new = ["--cache-dir", tmp_path / "elsewhere"]
    assert train("--resume", run, "--steps", "9", "--data", other, *new) == 2
    assert f"the text is not what {run} was trained on" in capfd.readouterr().err
    assert train("--resume", run, "--steps", "9", "--data", there, *new) == 0
    assert (tmp_path / "elsewhere").is_dir() and not cache.exists()
    # Where it is now stands in the checkpoint.
    shutil.rmtree(tmp_path / "elsewhere")
    assert train("--resume", run, "--steps", "10") == 0
    assert open_checkpoint(run).step == 10


def test_a_prepared_folder_that_moved_is_named_with_data(train, tmp_path):
    run, cache = tmp_path / "run", tmp_path / "cache"
    assert train("--out", run, "--cache-dir", cache) == 0
    folder = RunFolder(run).corpus()
    folder.rename(tmp_path / "moved")
    assert train("--resume", run, "--steps", "9", "--data", tmp_path / "moved") == 0
    assert not any(cache.iterdir())


def test_an_average_starts_from_the_weights_that_were_loaded(train, tmp_path, tiny_run):
    """With a rate of 0 the weights stay, and the average with them: no trace of a random start."""
    flags = ["--init-from", tiny_run, "--ema", "0.9", "--learning-rate", "0", "--steps", "3"]
    assert train("--out", tmp_path / "run", *flags) == 0
    source = (tiny_run / "checkpoints" / "step-00000008" / AVERAGE).read_bytes()
    assert weights(tmp_path / "run", 3) == source
    average = (tmp_path / "run" / "checkpoints" / "step-00000003" / AVERAGE).read_bytes()
    assert average == source


def test_a_resume_tidies_up_under_the_lock(train, tmp_path, tiny_run, capfd):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    folder = run / "checkpoints"
    (folder / "step-00000008").rename(folder / ".step-00000008.old.tmp")
    shutil.copytree(folder / "step-00000004", folder / ".step-00000008.tmp")
    (run / "metrics.jsonl.tmp").touch()
    held = placing.lock(run)
    assert train("--resume", run, "--steps", "9") == 2
    assert "is being written by " in capfd.readouterr().err
    assert len(list(run.rglob("*.tmp"))) == 3
    held.close()
    assert train("--resume", run, "--steps", "9") == 0
    assert not list(run.rglob("*.tmp")) and RunFolder(run).checkpoints().keys() >= {8, 9}


def test_samples_that_cannot_be_kept_end_no_training(train, tmp_path, monkeypatch, capfd):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(samples, "append", full)
    assert train("--out", tmp_path / "run", "--sample-every", "4") == 0
    said = capfd.readouterr().err
    assert said.count("samples.txt: No space left on device; this sample is left out") == 2
