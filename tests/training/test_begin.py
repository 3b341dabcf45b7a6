"""Training that is started from Python: as from a command line, but it returns the folder."""

import pytest

from minillm.checkpoint.find import open_checkpoint
from minillm.flags import train as flags
from minillm.runtime import device
from minillm.scripts import train as script
from minillm.training.steps import steps
from minillm.training.watchdog import Stopped

SMALL = "--n-layer 1 --n-head 2 --d-model 16 --seq-len 16 --batch-size 4 --tokenizer byte "
SMALL += "--threads 1 --steps 3 --eval-every 0 --save-every 2"


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    monkeypatch.setattr(device, "measured_peak_flops", lambda where, dtype: 1e10)


def test_training_from_python_returns_the_folder(tmp_path, text_file):
    run = tmp_path / "run"
    places = ["--data", text_file, "--cache-dir", tmp_path / "cache", "--out", run]
    args = flags.parse([*SMALL.split(), *map(str, places)])
    assert script.train_from(args) == run and open_checkpoint(run).step == 3
    args = flags.parse(["--resume", str(run), "--steps", "5"])
    assert script.train_from(args) == run and open_checkpoint(run).step == 5
    assert script.train_from(flags.parse(["--resume", str(run)])) == run  # it is finished


def test_a_run_that_is_stopped_is_saved(tmp_path, text_file):
    """From Python it is an exception, not the end of the process."""

    def stopped(*args):
        for result in steps(*args):
            yield result
            raise Stopped(15)

    run = tmp_path / "run"
    places = ["--data", text_file, "--cache-dir", tmp_path / "cache", "--out", run]
    args = flags.parse([*SMALL.split(), *map(str, places)])
    with pytest.raises(Stopped, match="SIGTERM"):
        script.train_from(args, steps=stopped)
    assert open_checkpoint(run).step == 1
