"""Settings of a training that is started from Python: every flag is a keyword argument."""

from pathlib import Path

import pytest

from minillm.checkpoint.find import open_checkpoint
from minillm.errors import UsageError
from minillm.flags.train import NEWEST
from minillm.runtime import device
from minillm.scripts.train import train_with
from minillm.training.begin import arguments

SMALL = {"n_layer": 1, "n_head": 2, "d_model": 16, "seq_len": 16, "batch_size": 4, "steps": 3,
         "tokenizer": "byte", "threads": "1", "eval_every": 0, "save_every": 2}  # fmt: skip


def test_keywords_are_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b"):
        Path(name).write_text("the text")
    args = arguments({"data": [Path("a.txt"), "b"], "learning_rate": 0.5, "compile": False})
    assert (args.data, args.learning_rate, args.compile) == (["a.txt", "b"], 0.5, False)
    assert args.steps is None and args.resume is None
    assert arguments({"resume": True}).resume is NEWEST
    assert arguments({"resume": False}).resume is None


@pytest.mark.parametrize("name", ["stepz", "help", "print_config", "n-layer"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(UsageError, match=f"{name}: unknown setting"):
        arguments({name: 1})


def test_a_value_of_the_wrong_type_is_refused(tmp_path):
    with pytest.raises(UsageError, match="steps"):
        train_with(steps="many", out=tmp_path / "run")


def test_training_from_python_returns_the_folder(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(device, "measured_peak_flops", lambda where, dtype: 1e10)
    places = {"data": text_file, "cache_dir": tmp_path / "cache", "out": tmp_path / "run"}
    run = train_with(**SMALL, **places)
    assert run == tmp_path / "run" and open_checkpoint(run).step == 3
    assert train_with(resume=run, steps=5) == run and open_checkpoint(run).step == 5
    assert train_with(resume=run) == run  # it is finished
