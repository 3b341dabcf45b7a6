"""What a file may ask for before anything is allocated, and what is never opened."""

import json
import os
import shutil
import struct
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from minillm.checkpoint import (
    read as reading,
    sharded_safetensors as tensorfiles,
)
from minillm.checkpoint.find import load_run, open_checkpoint
from minillm.checkpoint.run_folder import RunFolder
from minillm.checkpoint.sharded_safetensors import TensorFiles
from minillm.data import shards, tokenizer_sandbox as foreign
from minillm.data.tokenizer import load_tokenizer, train_tokenizer
from minillm.errors import CorruptError, UnavailableError
from minillm.runtime import files as storage, program
from minillm.scripts import sample
from tests.support.damaging import reseal, rewrite

LAST = "checkpoints/step-00000008"
WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    return shutil.copytree(tiny_run, tmp_path / "run")


def headed(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


EMPTY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
HEADERS = {
    "too long": (b'{"x":' + EMPTY.encode() + b"," + b" " * 10_000_000 + b'"y":1}', "at most 1000"),
    "too many": (
        ("{" + ",".join(f'"{n}":{EMPTY}' for n in range(100_001)) + "}").encode(), "holds 100001",
    ),
    "a name twice": (f'{{"x":{EMPTY},"x":{EMPTY}}}'.encode(), "or repeats a name"),
    "a key twice": (b'{"x":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
                    "or repeats a name"),
    "too deep": (b"[" * 100_000, "its header is not JSON"),
    "dimensions without end": (
        b'{"x":{"dtype":"F32","shape":[%s0],"data_offsets":[0,0]}}' % (b"1," * 99), "damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("header, message", HEADERS.values(), ids=HEADERS)
def test_headers(tmp_path, header, message, monkeypatch):
    path = headed(tmp_path / "x.safetensors", header)
    with pytest.raises(CorruptError, match=f"x.safetensors: .*{message}"):
        TensorFiles([path])
    monkeypatch.setattr(tensorfiles, "MAX_TENSORS", 1)
    assert TensorFiles([headed(path, f'{{"x":{EMPTY}}}'.encode())]).tensors.keys() == {"x"}


def test_a_header_of_any_length_is_not_read(tmp_path, monkeypatch):
    """A sparse file of 1 TiB: its first 8 bytes are enough."""
    with (tmp_path / "x").open("wb") as file:
        file.write(struct.pack("<Q", 1 << 39))
        file.truncate(1 << 40)
    start = time.monotonic()
    with pytest.raises(CorruptError, match="states 549755813888 bytes of header"):
        TensorFiles([tmp_path / "x"])
    assert time.monotonic() - start < 1


def test_large_json_is_not_read(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptError, match="x.json: larger than 64 MiB; do this"):
        storage.read_json(tmp_path / "x.json", "do this")
    if hasattr(os, "mkfifo"):  # reading one waits for a writer
        os.mkfifo(tmp_path / "y.json")
        with pytest.raises(CorruptError, match="y.json: is missing, or not a file"):
            storage.read_json(tmp_path / "y.json")


@pytest.mark.parametrize(
    "raw",
    [b'{"version": 1, "x": ' + b"[" * 50_000, b'{"version": 1, "x": ' + b"9" * 5000 + b"}",
     b'{"version": 1, "x": NaN, "sha256": "0"}', b'{"version": 1, "x": 1e999, "sha256": "0"}'],
)  # fmt: skip
def test_json_that_is_no_number_or_too_deep(tmp_path, raw):
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(CorruptError, match="x.json: damaged"):
        storage.read_json(tmp_path / "x.json")


CONFIGS = {
    "giant": ({"model.d_model": 1 << 20, "model.n_layer": 10_000, "model.d_ff": 1 << 24}, "states"),
    "beyond the flags": ({"model.n_layer": 10**15}, "n_layer 1000000000000000 is out of range"),
    "a large context": ({"model.position": "learned", "model.seq_len": 1 << 24}, "parameters"),
    "text": ({"model.n_layer": "1"}, "expected int"),
    "half a layer": ({"model.n_layer": 1.5}, "n_layer 1.5 is a float, expected int"),
    "true layers": ({"model.n_layer": True}, "n_layer True is a bool"),
    "no dropout": ({"model.dropout": None}, "dropout None is a NoneType, expected float"),
    "a list": ({"model": [1]}, "states no model"),
    "a number": ({"model": 1}, "states no model"),
    "recurrent": ({"model.recurrent": 5}, "recurrent 5 is a int, expected str"),
    "bos beyond": ({"model.bos_id": 257}, "bos_id is 257"),
    "bos of text": ({"model.bos_id": "256"}, "bos_id is '256'"),
    "no training": ({"train": None}, "states no settings of training"),
}


@pytest.mark.parametrize("changes, message", CONFIGS.values(), ids=CONFIGS)
def test_configurations(run, changes, message):
    rewrite(run / "config.json", changes)
    rewrite(run / LAST / "state.json", {"model": {}})  # else it would tell that this is another one
    reseal(run / LAST)
    start = time.monotonic()
    with pytest.raises(CorruptError, match=f"config.json.*{message}"):
        load_run(run)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("name", ["corpus", "corpus_key", "asked_vocab_size", "tokenizer_sha256"])
@pytest.mark.parametrize("value", [["x"], 1.5, ...])
def test_facts_of_a_run(run, train, capsys, name, value):
    if name == "asked_vocab_size" and value is ...:
        pytest.skip("none was asked for")
    rewrite(run / "config.json", {name: value})
    assert train("--resume", run, "--steps", "9") == 3
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "config.json" in line


ENTRY = {"bytes": 1, "sha256": "0"}
MANIFESTS = {
    "no files": {"files": {}},
    "a list": {"files": [1]},
    "a name that leads out": {"files": {"state.json": ENTRY, "../../config.json": ENTRY}},
    "another name": {"files": {"state.json": ENTRY, "x.safetensors": ENTRY}},
    "no entry": {"files": {"state.json": 1}},
    "a size of text": {"files": {"state.json": {"bytes": "1", "sha256": ""}}},
    "no digest": {"files": {"state.json": {"bytes": 1, "sha256": None}}},
}


@pytest.mark.parametrize("changes", MANIFESTS.values(), ids=MANIFESTS)
def test_manifests(run, changes):
    rewrite(run / LAST / "manifest.json", changes)
    with pytest.raises(CorruptError, match="step-00000008/manifest.json: "):
        open_checkpoint(run, "8")


COUNTS = {
    "a negative size": {"shards.0.bytes": -2},
    "tokens of text": {"shards.0.tokens": "9"},
    "half an id": {"shards.0.max_id": 1.5},
    "a huge vocabulary": {"vocab_size": 1 << 70},
    "true bytes": {"bytes_per_split.train": True},
    "sequences of nothing": {"sequence": 0},
}


@pytest.mark.parametrize("changes", COUNTS.values(), ids=COUNTS)
def test_indices(tiny_run, tmp_path, changes):
    folder = shutil.copytree(RunFolder(tiny_run).corpus(), tmp_path / "corpus")
    index = storage.read_json(folder / "index.json")
    for name, value in changes.items():
        holder, (*outer, key) = index, name.split(".")
        for step in outer:
            holder = holder[int(step) if step.isdecimal() else step]
        holder[key] = value
    storage.write_json(folder / "index.json", index)
    with pytest.raises(CorruptError, match="index.json: "):
        shards.open_corpus(folder)


def pickled(path: Path) -> Path:
    path.write_bytes(b"\x80\x02}q\x00X\x01\x00\x00\x00wq\x01]q\x02K\x01as.")  # {"w": [1]}
    return path


def zipped(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", b"x")
    return path


def plain(path: Path) -> Path:
    path.write_text("the cat sat on a mat. " * 50)
    return path


NAMES = [(plain, "x.pt"), (plain, "x.pkl"), (plain, "x.BIN"), (plain, "x.ckpt"),
         (pickled, "x.txt"), (zipped, "x.model"), (pickled, "x.model"), (zipped, "x")]  # fmt: skip


@pytest.mark.parametrize("make, name", NAMES)
def test_pickles_are_refused_by_name_and_by_content(run, train, tmp_path, capsys, make, name):
    path = make(tmp_path / name)
    for words in (["--data", path], ["--tokenizer", path], ["--resume", path],
                  ["--init-from", path]):  # fmt: skip
        given = words if words[0] == "--resume" else [*words, "--out", tmp_path / "new"]
        assert train(*given) == 2, words
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and str(path) in line and "pickled" in line
    for words in ([str(path)], [str(run), "--checkpoint", str(path)]):
        assert program.run("sample.py", sample.main, words) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and str(path) in line


@pytest.mark.parametrize("make", [pickled, zipped])
def test_pickles_under_another_name(run, make):
    make(run / LAST / WEIGHTS)
    with pytest.raises(CorruptError, match=WEIGHTS):
        open_checkpoint(run, "8")
    reseal(run / LAST)
    with pytest.raises(CorruptError, match=f"{WEIGHTS}: is a pickle or an archive of one"):
        open_checkpoint(run, "8").tensors("model")


def test_a_hostile_file_of_tensors_is_refused_before_it_is_read(run, train, monkeypatch, capsys):
    """64 GiB of zeros that take no room on the disk, under a name that the model does not have."""
    path = run / LAST / WEIGHTS
    raw = path.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    header, end = json.loads(raw[8:length]), len(raw) - length
    header["more"] = {"dtype": "F32", "shape": [1 << 34], "data_offsets": [end, end + (1 << 36)]}
    headed(path, json.dumps(header).encode(), raw[length:])
    os.truncate(path, path.stat().st_size + (1 << 36))
    monkeypatch.setattr(reading, "_check_file", lambda path, stated: None)  # would take minutes
    assert train("--resume", run, "--steps", "9") == 3
    assert "has more, which is unknown" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer("bpe", ["the cat sat on a mat\n" * 20], 330).to_bytes()


def test_a_foreign_model_is_tried_in_another_process(model, tmp_path, monkeypatch):
    path, started = tmp_path / "x.model", []
    path.write_bytes(model)
    real = subprocess.run
    monkeypatch.setattr(
        foreign.subprocess, "run", lambda *a, **o: started.append(a) or real(*a, **o)
    )
    assert load_tokenizer(path).vocab_size == load_tokenizer(path, foreign=True).vocab_size
    assert len(started) == 1
    path.write_bytes(model[:-30] + bytes(30))
    with pytest.raises(CorruptError, match="x.model: not a SentencePiece model, or damaged"):
        load_tokenizer(path, foreign=True)


@pytest.mark.parametrize(
    "script, kind, message",
    [
        ("import os; os.kill(os.getpid(), 11)", CorruptError, r"crashes SentencePiece \(SIGSEGV\)"),
        ("import os; os.abort()", CorruptError, r"crashes SentencePiece \(SIGABRT\)"),
        ("import time; time.sleep(60)", CorruptError, "takes more than 0.5 s"),
        ("import nothing_of_this_name", UnavailableError, "No module named 'nothing_of"),
    ],
)
def test_a_model_that_takes_its_loader_along(
    model, train, tmp_path, monkeypatch, capfd, script, kind, message
):
    (tmp_path / "x.model").write_bytes(model)
    monkeypatch.setattr(foreign, "TRIAL", script)
    monkeypatch.setattr(foreign, "PATIENCE_S", 0.5 if "sleep" in script else 60)
    with pytest.raises(kind, match=f"x.model: .*{message}"):
        load_tokenizer(tmp_path / "x.model", foreign=True)
    code = train("--tokenizer", tmp_path / "x.model", "--out", tmp_path / "run")
    assert code == kind.code and capfd.readouterr().err.count("\n") == 1


def test_what_a_run_or_a_corpus_vouches_for_is_not_tried(train, tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "TRIAL", "import os; os.abort()")
    flags = ["--tokenizer", "bpe", "--vocab-size", "330", "--cache-dir", tmp_path / "prepared"]
    assert train("--out", tmp_path / "run", "--steps", "1", *flags) == 0
    assert train("--resume", tmp_path / "run", "--steps", "2") == 0
    assert load_run(tmp_path / "run")[1].kind == "bpe"
