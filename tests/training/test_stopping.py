"""Asked to end, a run finishes its step, saves and leaves; and goes on as if nothing had been."""

import os
import pty
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from minillm.checkpoint.find import open_checkpoint
from minillm.checkpoint.run_folder import RunFolder
from minillm.checkpoint.write import save
from minillm.data import encode as encoding
from minillm.runtime import signals
from minillm.runtime.files import read_json
from minillm.scripts import train as script
from minillm.training.gradients import accumulate
from minillm.training.steps import steps
from minillm.training.validation import evaluate_split
from tests.support.broad import broad
from tests.system.test_resume import metrics

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="not on this system"),
    pytest.mark.usefixtures("default_signals"),
]
NOTICES = [signal.Signals(n) for n in signals.ENDING if n != signal.SIGTERM]
FLAGS = ["--ema", "0.5", "--steps", "8", "--eval-every", "4", "--keep-last", "9"]


def tensors(run: Path) -> dict[str, str]:
    """The hashes of the last checkpoint's tensors."""
    steps = RunFolder(run).checkpoints()
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


def stepping(accumulate):
    """The steps of a training whose gradients `accumulate` computes."""
    return partial(steps, accumulate=accumulate)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@broad("where", ["a step", "an evaluation", "a save", "the last evaluation"], quick=(0, 2))
def test_a_signal_ends_the_run_with_its_step_saved(train, tmp_path, capfd, number, code, where):
    assert train("--out", tmp_path / "whole", *FLAGS) == 0
    step = {"a step": 3, "the last evaluation": 8}.get(where, 4)
    if where == "a step":
        replaced = {"steps": stepping(send(number, 3, accumulate))}
    elif where == "a save":
        replaced = {"write": send(number, 1, save)}
    else:
        at = 2 if where == "the last evaluation" else 1
        replaced = {"evaluate": send(number, at, evaluate_split)}
    capfd.readouterr()
    assert train("--out", tmp_path / "run", *FLAGS, **replaced) == code
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


@pytest.mark.parametrize("number", NOTICES, ids=lambda number: number.name)
def test_notices_of_a_terminal_or_a_scheduler_save_the_step(train, tmp_path, capfd, number):
    run = tmp_path / "run"
    sending = stepping(send(number, 3, accumulate))
    before = signal.getsignal(number)
    assert train("--out", run, *FLAGS, steps=sending) == 128 + number
    assert open_checkpoint(run).step == 3
    said = capfd.readouterr().err.splitlines()
    assert f"stopped by {number.name} at step 3, which is saved" in said[-1]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_was_ignored_stays_ignored(train, tmp_path, number):
    """As nohup wants it, and the shell for a job in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        sending = stepping(send(number, 3, accumulate))
        assert train("--out", tmp_path / "run", *FLAGS, steps=sending) == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_reader_that_went_away_costs_no_work(train, tmp_path, monkeypatch):
    """`train.py 2>&1 | tee log`, of which tee has ended: the step is saved, as after a signal."""
    run = tmp_path / "run"
    reader, writer = os.pipe()
    calls = []

    def leave(*args):
        calls.append(1)
        if len(calls) == 3:
            os.close(reader)
        return accumulate(*args)

    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        assert train("--out", run, *FLAGS, steps=stepping(leave)) == 141
    assert open_checkpoint(run).step == 3


@pytest.mark.slow
@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_costs_no_work(tmp_path, text_file, nohup):
    """Its processes get SIGHUP, and every message that they write to it is an error from then on.

    Under nohup the run goes on, and is saved when it is asked to end.
    """
    run, root = tmp_path / "run", Path(script.__file__).parent
    command = [sys.executable, str(root / "train.py"), "--data", str(text_file), "--out", str(run)]
    command += (
        "--tokenizer byte --threads 1 --n-layer 1 --n-head 2 --d-model 16 --seq-len 16".split()
    )
    command += "--batch-size 4 --steps 1000000 --log-every 1 --eval-every 0 --save-every 0".split()
    pid, terminal = pty.fork()
    if pid == 0:
        if nohup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.chdir(tmp_path)
        os.execv(sys.executable, command)
    with os.fdopen(terminal, "rb", buffering=0) as screen:  # what is written there must be read
        while not _rows(run) > 5:
            assert screen.read(1 << 16)
    if nohup:
        seen, end = _rows(run), time.monotonic() + 60
        while _rows(run) < seen + 50:
            assert time.monotonic() < end
            time.sleep(0.05)
        os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (143 if nohup else 129)
    assert open_checkpoint(run).step >= 5


def _rows(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


ENDINGS = [
    (signal.SIGTERM, 143, "terminated"),
    (signal.SIGINT, 130, "interrupted"),
    (signal.SIGHUP, 129, "ended by SIGHUP"),
    (signal.SIGUSR1, 138, "ended by SIGUSR1"),
]


@pytest.mark.parametrize("number, code, word", ENDINGS)
def test_a_signal_before_the_loop(
    train, tmp_path, monkeypatch, capfd, text_file, number, code, word
):
    """Nothing half done is left: neither a corpus nor a run."""
    copy = tmp_path / "a.txt"
    copy.write_text(text_file.read_text() + "more")
    cache, out = tmp_path / "cache", tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode", send(number, 1, encoding.encode))
        assert train("--data", copy, "--cache-dir", cache, "--out", out) == code
    said = capfd.readouterr().err.splitlines()[-1]
    assert said == f"train.py: {word}"
    assert not out.exists() and not any(cache.iterdir())
    assert train("--data", copy, "--cache-dir", cache, "--out", out) == 0


def test_a_finished_run_that_is_made_longer_is_not_finished(train, tmp_path):
    """What it was saved as at its first end must not make a second, broken one look complete."""
    assert train("--out", tmp_path / "run", *FLAGS) == 0
    longer = ["--steps", "12", "--eval-every", "10"]
    stopped = send(signal.SIGTERM, 2, evaluate_split)
    assert train("--resume", tmp_path / "run", *longer, evaluate=stopped) == 143
    assert not open_checkpoint(tmp_path / "run").state["progress"]["ended"]
    assert train("--resume", tmp_path / "run") == 0
    assert open_checkpoint(tmp_path / "run").state["progress"]["ended"]
    assert 12 in metrics(tmp_path / "run", "val_loss")


@pytest.mark.parametrize("longer", [["--steps", "12"], ["--epochs", "0.2"]])
def test_a_run_made_longer_and_killed_is_as_long(train, tmp_path, longer):
    """Though it had come to no checkpoint yet; nobody has to say it twice."""
    run = tmp_path / "run"
    assert train("--out", run, *FLAGS) == 0
    with pytest.raises(Killed):
        train("--resume", run, *longer, steps=stepping(killed))
    assert max(RunFolder(run).checkpoints()) == 8 and train("--resume", run) == 0
    assert open_checkpoint(run).step > 8 and open_checkpoint(run).state["progress"]["ended"]
