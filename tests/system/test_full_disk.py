"""A disk that is full, and a step that never ends: what the trainer makes of them."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minillm.checkpoint import write as saving
from minillm.checkpoint.find import open_checkpoint
from minillm.checkpoint.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
EACH = ["--save-every", "2", "--eval-every", "0", "--keep-last", "9"]


@pytest.fixture
def full_at(monkeypatch):
    """full_at(*steps) -> what writes checkpoints on a disk that is full at these steps, in the
    middle of a checkpoint.
    """

    def set_full(*steps: int) -> Callable:
        write = saving.write_whole

        def full(path, pieces):
            if "optimizer" in path.name and now[0] in steps:
                path.write_bytes(b"half of it")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write does
            return write(path, pieces)

        def noted(run, step, *rest):
            now[0] = step
            return saving.save(run, step, *rest)

        now = [0]
        monkeypatch.setattr(saving, "write_whole", full)
        return noted

    return set_full


def test_training_goes_on_and_saves_when_it_can(train, tmp_path, full_at, capfd):
    flags = [*EACH, "--steps", "10"]
    assert train("--out", tmp_path / "run", *flags, write=full_at(4, 6)) == 0
    assert sorted(RunFolder(tmp_path / "run").checkpoints()) == [2, 8, 10]
    assert open_checkpoint(tmp_path / "run").step == 10
    said = [line for line in capfd.readouterr().err.splitlines() if "not saved" in line]
    assert [line.split(":")[0] for line in said] == [
        f"warning   step {step} is not saved" for step in (4, 6)
    ]
    assert all(line.endswith("; training goes on") and "No space left" in line for line in said)
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_three_times_in_a_row_are_enough(train, tmp_path, full_at, capfd):
    flags, full = [*EACH, "--steps", "20"], full_at(4, 6, 8)
    assert train("--out", tmp_path / "run", *flags, write=full) == 5
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("train.py: error: ") and last.endswith(": No space left on device")
    assert sorted(RunFolder(tmp_path / "run").checkpoints()) == [2]
    assert train("--resume", tmp_path / "run", "--steps", "3", write=full) == 0


def test_the_last_checkpoint_must_be_saved(train, tmp_path, full_at, capfd):
    assert train("--out", tmp_path / "run", *EACH, write=full_at(8)) == 5
    assert capfd.readouterr().err.splitlines()[-1].endswith(": No space left on device")
    assert sorted(RunFolder(tmp_path / "run").checkpoints()) == [2, 4, 6]
    assert open_checkpoint(tmp_path / "run").step == 6


@pytest.mark.slow
def test_a_step_that_never_ends(tmp_path, text_file):
    """A process of its own, which ends with 7 and the stacks, and whose run goes on."""
    script = (
        "import sys, time\nfrom functools import partial\n"
        "from minillm.runtime import program\n"
        "from minillm.scripts import train as script\n"
        "from minillm.training.steps import accumulate, steps\n"
        "calls = []\n"
        "def hanging(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 6: time.sleep(600)\n"
        "    return accumulate(*args)\n"
        "main = partial(script.main, steps=partial(steps, accumulate=hanging))\n"
        "sys.exit(program.run('train.py', main, sys.argv[1:]))"
    )
    flags = [
        "--data", str(text_file), "--cache-dir", str(tmp_path / "cache"), "--tokenizer", "byte",
        "--n-layer", "1", "--n-head", "2", "--d-model", "16", "--seq-len", "16",
        "--batch-size", "4", "--steps", "8", "--threads", "1", "--out", str(tmp_path / "run"),
        *EACH,
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, *flags, "--hang-timeout", "3"], cwd=ROOT, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr[-2000:]
    assert "train.py: error: no sign of life for " in done.stderr and "in hanging" in done.stderr
    assert "Traceback (most recent" not in done.stderr
    assert open_checkpoint(tmp_path / "run").step == 4
