"""Asked to end, a run finishes its step, saves and leaves; and goes on as if nothing had been."""

import os
import signal
from pathlib import Path

import pytest

from minillm import encoding, training, validation
from minillm.checkpoint import open_checkpoint
from minillm.runs import checkpoints_of
from minillm.scripts import train as script
from minillm.storage import read_json
from tests.test_resume import metrics

pytestmark = pytest.mark.skipif(os.name != "posix", reason="not on this system")
FLAGS = ["--ema", "0.5", "--steps", "8", "--eval-every", "4", "--keep-last", "9"]


def tensors(run: Path) -> dict[str, str]:
    """The hashes of the last checkpoint's tensors."""
    steps = checkpoints_of(run)
    files = read_json(steps[max(steps)] / "manifest.json")["files"]
    return {name: entry["sha256"] for name, entry in files.items() if "safetensors" in name}


def send(number: int, when: int, whole):
    """`whole`, at the call `when` of which this process is sent a signal."""
    calls = []

    def sending(*args, **kwargs):
        calls.append(1)
        if len(calls) == when:
            os.kill(os.getpid(), number)
        return whole(*args, **kwargs)

    return sending


class Killed(BaseException):
    """Nothing of ours catches it."""


def killed(*args):
    """In place of a function, in which the process dies."""
    raise Killed


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("where", ["a step", "an evaluation", "a save", "the last evaluation"])
def test_a_signal_ends_the_run_with_its_step_saved(
    train, tmp_path, monkeypatch, capfd, number, code, where
):
    assert train("--out", tmp_path / "whole", *FLAGS) == 0
    step = {"a step": 3, "the last evaluation": 8}.get(where, 4)
    with monkeypatch.context() as patch:
        if where == "a step":
            patch.setattr(script, "accumulate", send(number, 3, script.accumulate))
        elif where == "a save":
            patch.setattr(training.checkpoint, "save", send(number, 1, training.checkpoint.save))
        else:
            at = 2 if where == "the last evaluation" else 1
            patch.setattr(validation, "evaluate", send(number, at, validation.evaluate))
        capfd.readouterr()
        assert train("--out", tmp_path / "run", *FLAGS) == code
    name = signal.Signals(number).name
    run = tmp_path / "run"
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"stopped by {name} at step {step}, which is saved; "
        f"continue: python train.py --resume {run}"
    )
    assert open_checkpoint(run).step == step
    assert train("--resume", run) == 0
    assert tensors(run) == tensors(tmp_path / "whole")
    for key in ("loss", "val_loss"):
        assert metrics(run, key) == metrics(tmp_path / "whole", key)
    assert train("--resume", run) == 0 and "is finished at step 8" in capfd.readouterr().err


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_loop(train, tmp_path, monkeypatch, capfd, text_file, number, code):
    """Nothing half done is left: neither a corpus nor a run."""
    copy = tmp_path / "a.txt"
    copy.write_text(text_file.read_text() + "more")
    cache, out = tmp_path / "cache", tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode", send(number, 1, encoding.encode))
        assert train("--data", copy, "--cache-dir", cache, "--out", out) == code
    said = capfd.readouterr().err.splitlines()[-1]
    assert said == f"train.py: {'terminated' if code == 143 else 'interrupted'}"
    assert not out.exists() and not any(cache.iterdir())
    assert train("--data", copy, "--cache-dir", cache, "--out", out) == 0


def test_a_finished_run_that_is_made_longer_is_not_finished(train, tmp_path, monkeypatch):
    """What it was saved as at its first end must not make a second, broken one look complete."""
    assert train("--out", tmp_path / "run", *FLAGS) == 0
    with monkeypatch.context() as patch:
        patch.setattr(validation, "evaluate", send(signal.SIGTERM, 2, validation.evaluate))
        assert train("--resume", tmp_path / "run", "--steps", "12", "--eval-every", "10") == 143
    assert not open_checkpoint(tmp_path / "run").state["progress"]["ended"]
    assert train("--resume", tmp_path / "run") == 0
    assert open_checkpoint(tmp_path / "run").state["progress"]["ended"]
    assert 12 in metrics(tmp_path / "run", "val_loss")


@pytest.mark.parametrize("longer", [["--steps", "12"], ["--epochs", "0.2"]])
def test_a_run_made_longer_and_killed_is_as_long(train, tmp_path, monkeypatch, longer):
    """Though it had come to no checkpoint yet; nobody has to say it twice."""
    run = tmp_path / "run"
    assert train("--out", run, *FLAGS) == 0
    with monkeypatch.context() as patch:
        patch.setattr(script, "accumulate", killed)
        with pytest.raises(Killed):
            train("--resume", run, *longer)
    assert max(checkpoints_of(run)) == 8 and train("--resume", run) == 0
    assert open_checkpoint(run).step > 8 and open_checkpoint(run).state["progress"]["ended"]
