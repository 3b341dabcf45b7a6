"""What is given for a run and is none: the message says what it is, and what helps."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from minillm.checkpoint.run_folder import RunFolder
from minillm.errors import CorruptError, UsageError
from minillm.runtime import program
from minillm.scripts import sample as script
from tests.convert.test_huginn import published, write


@pytest.fixture
def folder(tmp_path, tiny_run):
    """A folder of everything that users might name."""
    write_huginn = tmp_path / "huginn"
    write_huginn.mkdir()
    write(write_huginn, published())
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    (tmp_path / "runs").mkdir()
    for name in ("a", "b c"):
        shutil.copytree(tiny_run, tmp_path / "runs" / name)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("index.json", "train-00000.bin"):
        (corpus / name).touch()
    (tmp_path / "weights").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "weights" / "model.safetensors")
    for name in ("m.gguf", "m.safetensors", "m.bin", "m.pt", "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


STEP = "runs/a/checkpoints/step-00000004"
CASES = {
    "huginn": "Hugging Face folder in the layout of huginn-0125, not a run; in Python minillm.con",
    "llama": "is a Hugging Face folder (of llama), not a run; name a run that train.py has made",
    STEP: "is checkpoint 4 of a run; name the run itself, as in: ",
    "runs/b c/checkpoints": "is the folder of checkpoints of a run; name the run itself, as in: ",
    f"{STEP}/state.json": "is a file of a run, not a run folder; name the run itself, runs/a",
    "runs/a/config.json": "is a file of a run, not a run folder; name the run itself, runs/a",
    "runs": "is not a run of minillm: it has no config.json; it holds runs, name one of them: ",
    "corpus": "is a prepared corpus, not a run; to train on it: ",
    "weights": "it has no config.json; there are weights in it, but nothing says of which model",
    "m.gguf": "is a GGUF file, not a run folder",
    "m.safetensors": "is a safetensors file, not a run folder",
    "m.bin": "is a file, not a run folder; pickled checkpoints are never read",
    "m.pt": "is a file, not a run folder; pickled checkpoints are never read",
    "notes.txt": "is a file, not a run folder; name the folder that train.py made",
    "a": "a: no such run; did you mean runs/a?",
    "none": "none: no such run",
}


def test_the_message_says_what_it_is(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for name, words in CASES.items():
        with pytest.raises(UsageError) as refused:
            RunFolder(folder.joinpath(name).relative_to(folder)).require()
        assert words in str(refused.value) and "\n" not in str(refused.value), name
        assert "--resume" not in str(refused.value)
    assert str(refused.value) == "none: no such run"
    with pytest.raises(UsageError, match="--checkpoint 4$"):
        RunFolder(folder / STEP).require()
    assert program.run("sample.py", script.main, ["huginn"]) == 2
    assert "in the layout of huginn-0125" in capsys.readouterr().err
    assert RunFolder(folder / "runs" / "a").require().path == folder / "runs" / "a"


def test_init_from_and_resume_say_the_same(folder, train, capsys):
    for flag in ("--init-from", "--resume"):
        for name in ("huginn", "llama", STEP):
            assert train(flag, folder / name) == 2
            said = capsys.readouterr().err
            assert CASES[name][-30:] in said and "damaged" not in said


def test_a_damaged_run_is_still_called_damaged(folder):
    path = folder / "runs" / "a" / "config.json"
    path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 7'))
    with pytest.raises(CorruptError, match="damaged"):
        _ = RunFolder(folder / "runs" / "a").model
