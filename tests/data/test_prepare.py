"""prepare.py, split.py, encode.py, shards.py and the prepare command: text to checked shards."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from minillm.commands import prepare as command
from minillm.data import corpus_writer, documents, encode, prepare as prepare_file, shards, split
from minillm.data.batches import Tokens
from minillm.data.prepare import Preparation, prepare
from minillm.data.tokenizer import train_tokenizer
from minillm.errors import CorruptError, UnavailableError, UsageError
from minillm.runtime.program import run


def quiet(line):
    pass


def write_documents(folder, n=20):
    folder.mkdir()
    for i in range(n):
        (folder / f"{i:03d}.txt").write_text(f"document {i}\n" * (i + 5))
    return folder


def make(source, folder, **settings):
    paths = [str(source)] if source else None
    place = {"out": folder, "say": quiet}
    place |= {name: settings.pop(name) for name in ("say", "cache_dir") if name in settings}
    how = Preparation(**{"tokenizer": "byte", "val_fraction": 0.05, **settings})
    return prepare(paths, how, **place)


def ids(corpus, side):
    tokens = Tokens(corpus, side)
    return tokens.read(0, len(tokens))


def texts(corpus, side):
    """The documents of a split, cut at their BOS."""
    tokenizer = corpus.tokenizer()
    pieces = np.split(ids(corpus, side), np.flatnonzero(ids(corpus, side) == tokenizer.bos_id))
    assert len(pieces[0]) == 0
    return [tokenizer.decode(piece.tolist()) for piece in pieces[1:]]


@pytest.fixture
def source(tmp_path):
    return write_documents(tmp_path / "source")


@pytest.fixture
def prepared(source, tmp_path):
    return make(source, tmp_path / "corpus", val_fraction=0.2)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_every_document_once_in_order_after_its_bos(source, tmp_path, kind):
    corpus = make(source, tmp_path / "corpus", val_fraction=0.2, tokenizer=kind)
    wanted = [path.read_text() for path in sorted(source.iterdir())]
    train, val = texts(corpus, "train"), texts(corpus, "val")
    assert sorted(train + val) == sorted(wanted)
    assert [text for text in wanted if text in train] == train
    assert [text for text in wanted if text in val] == val
    assert corpus.documents == {"train": len(train), "val": len(val)}
    assert corpus.bytes == {"train": len("".join(train)), "val": len("".join(val))}
    total = sum(map(len, wanted))
    assert 0.2 * total <= corpus.bytes["val"] < 0.4 * total
    assert (corpus.folder / corpus.tokenizer_file.name).is_file()


def test_nanogpt_split_of_a_single_document(tmp_path):
    text = "".join(chr(97 + i * i % 26) for i in range(1003)) + "\u00e9\u00e9"
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    corpus = make(
        tmp_path / "input.txt", tmp_path / "c", tokenizer="char", val_fraction=0.1, errors="strict"
    )
    tokenizer = corpus.tokenizer()
    assert tokenizer.vocab_size == len(set(text))
    assert tokenizer.decode(ids(corpus, "train").tolist()) == text[: int(len(text) * 0.9)]
    assert tokenizer.decode(ids(corpus, "val").tolist()) == text[int(len(text) * 0.9) :]
    assert corpus.tokens == {"train": 904, "val": 101}
    assert corpus.bytes == {"train": 904, "val": 103}


def test_no_validation_split(source, tmp_path):
    corpus = make(source, tmp_path / "c", val_fraction=0)
    assert (corpus.documents["val"], corpus.tokens["val"], corpus.bytes["val"]) == (0, 0, 0)
    assert not list(corpus.folder.glob("val-*"))


def test_copies_fall_on_one_side_and_names_do_not_matter(tmp_path):
    def sides(names):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for i, name in enumerate(names * 2):
            (folder / f"{name}{i}.txt").write_text(f"text {name}\n" * 10)
        corpus = make(folder, None, cache_dir=tmp_path / "cache", val_fraction=0.3)
        return set(texts(corpus, "train")), set(texts(corpus, "val"))

    train, val = sides(["a", "b", "c", "d", "e"])
    assert train and val and not train & val
    assert sides(["e", "c", "a", "d", "b"]) == (train, val)


def test_pool_gives_the_same_files_as_one_process(tmp_path):
    (tmp_path / "s").mkdir()
    for i in range(3):
        text = "".join(f"line {j * j} of {i}\tx\n" for j in range(40_000))
        (tmp_path / "s" / f"{i}.txt").write_text(text + "y" * 40_000 * i)
    made = [
        make(tmp_path / "s", tmp_path / f"c{n}", tokenizer="bpe", vocab_size=400, workers=n)
        for n in (1, 2, 3)
    ]
    names = sorted(path.name for path in made[0].folder.iterdir())
    assert names == ["index.json", "tokenizer.model", "train-00000.bin", "val-00000.bin"]
    for name in names:
        first = (made[0].folder / name).read_bytes()
        assert all((corpus.folder / name).read_bytes() == first for corpus in made)
    whole = [(tmp_path / "s" / f"{i}.txt").read_text() for i in range(3)]
    heads, tails = texts(made[0], "train"), texts(made[0], "val")
    assert [head + tail for head, tail in zip(heads, tails, strict=True)] == whole


def test_long_texts_are_cut_where_the_ids_do_not_change():
    tokenizer = train_tokenizer("bpe", ["one two three\n" * 50, "x" * 100], 320)
    text = "a line\n" * 3 + "x" * (2 * encode.PIECE + 77) + "\nlast one"
    stretches = list(encode._stretches(text))
    assert len(stretches) > 2 and "".join(stretches) == text
    assert sum((tokenizer.encode(part) for part in stretches), []) == tokenizer.encode(text)


def test_a_worker_that_dies_is_one_line(monkeypatch, source, tmp_path):
    monkeypatch.setattr(encode, "load_tokenizer", lambda file: os._exit(9))
    with pytest.raises(UnavailableError, match="worker process died"):
        make(source, tmp_path / "c", workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_second_run_finds_the_cache_without_encoding(monkeypatch, source, tmp_path):
    said = []
    settings = {"tokenizer": "bpe", "cache_dir": tmp_path / "cache", "say": said.append}
    first = make(source, None, **settings)
    assert any(str(first.folder) in line for line in said)
    monkeypatch.setattr(encode, "encode", None)
    for file in (prepare_file, corpus_writer):
        monkeypatch.setattr(file, "train_tokenizer", None)
    said.clear()
    assert make(source, None, **settings) == first
    assert len(said) == 1 and str(first.folder) in said[0]
    (source / "000.txt").write_text("other text")
    with pytest.raises(TypeError):
        make(source, None, **settings)


def test_settings_name_the_cache(source, tmp_path):
    cache = tmp_path / "cache"
    changed = [
        {},
        {"val_fraction": 0.3},
        {"tokenizer": "char"},
        {"tokenizer": "bpe"},
        {"tokenizer": "bpe", "vocab_size": 330},
        {"shard_tokens": 100},
    ]
    made = {make(source, None, cache_dir=cache, **settings).folder for settings in changed}
    assert len(made) == len(changed)
    assert all(folder.parent == cache and len(folder.name) == 16 for folder in made)


def test_a_tokenizer_that_is_trained_otherwise_has_another_key(source, tmp_path):
    """Where lines with U+2585 were left out of training, the old corpus must not be found."""
    plain = make(source, tmp_path / "a", tokenizer="bpe")
    assert "reserved" not in plain.settings
    (source / "000.txt").write_text("load \u2585\n" * 50, encoding="utf-8")
    assert make(source, tmp_path / "b", tokenizer="bpe").settings["reserved"] is True
    assert "reserved" not in make(source, tmp_path / "c").settings


def test_same_out_again_is_opened_and_another_is_refused(source, tmp_path):
    first = make(source, tmp_path / "c")
    assert make(source, tmp_path / "c") == first
    with pytest.raises(UsageError, match="exists and is not this corpus"):
        make(source, tmp_path / "c", val_fraction=0.3)
    assert shards.open_corpus(tmp_path / "c") == first


def test_prepared_folder_is_opened_as_it_is(prepared):
    assert make(prepared.folder, None) == prepared
    with pytest.raises(UsageError, match="prepared with 257"):
        make(prepared.folder, None, vocab_size=300)


def test_tokenizer_from_a_file(prepared, source, tmp_path):
    corpus = make(source, tmp_path / "again", tokenizer=str(prepared.tokenizer_file))
    assert corpus.tokenizer().kind == "byte"
    bpe = make(source, tmp_path / "bpe", tokenizer="bpe", vocab_size=330)
    other = make(source, tmp_path / "other", tokenizer=str(bpe.tokenizer_file))
    assert (ids(other, "train") == ids(bpe, "train")).all()


def test_shards_split_and_read_as_one(source, tmp_path):
    whole = make(source, tmp_path / "a")
    cut = make(source, tmp_path / "b", shard_tokens=100)
    assert [shard.tokens for shard in cut.shards["train"]][:-1] == [100] * (
        len(cut.shards["train"]) - 1
    )
    assert len(cut.shards["train"]) > 5
    assert (ids(cut, "train") == ids(whole, "train")).all()
    assert cut.tokens == whole.tokens


def test_index_follows_the_contract(prepared):
    index = json.loads((prepared.folder / "index.json").read_text())
    assert index["version"] == 1
    assert (index["dtype"], index["vocab_size"]) == ("uint16", 257)
    assert index["tokenizer_sha256"] == prepared.tokenizer().sha256
    assert set(index["bytes_per_split"]) == set(index["documents"]) == {"train", "val"}
    assert set(index["shards"][0]) == {"name", "bytes", "tokens", "max_id", "sha256"}
    raw = np.fromfile(prepared.folder / "train-00000.bin", "<u2")
    assert raw.max() == index["shards"][0]["max_id"] == 256


def test_large_vocabulary_is_uint32_and_ids_are_checked(tmp_path):
    writer = shards.ShardWriter(tmp_path, "train", 70_000, 1000)
    writer.add(np.array([0, 69_999], np.uint32))
    assert writer.close()[0]["bytes"] == 8
    assert np.fromfile(tmp_path / "train-00000.bin", "<u4").tolist() == [0, 69_999]
    with pytest.raises(ValueError, match="id 65537 "):
        shards.ShardWriter(tmp_path, "val", 65_536, 10).add(np.array([65_537], np.uint32))


def test_blocks_are_hashed_one_by_one(tmp_path, monkeypatch):
    import hashlib

    monkeypatch.setattr(shards, "BLOCK", 64)
    writer = shards.ShardWriter(tmp_path, "train", 257, 100)
    for _ in range(11):
        writer.add(np.arange(13))
    first, second = writer.close()
    data = (tmp_path / "train-00000.bin").read_bytes()
    blocks = [data[i : i + 64] for i in range(0, 200, 64)]
    assert first["sha256"] == [hashlib.sha256(block).hexdigest() for block in blocks]
    assert (first["tokens"], second["tokens"], second["bytes"]) == (100, 43, 86)


def edit_index(folder, **changes):
    content = json.loads((folder / "index.json").read_text())
    content.pop("sha256")
    shards.write_index(folder, {**content, **changes})


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: damage(f / "tokenizer.json"), "tokenizer.json: is not the tokenizer"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
        (lambda f: damage(f / "index.json"), "index.json: "),
        (lambda f: (f / "index.json").write_text("{}"), "index.json: damaged, not the JSON"),
        (
            lambda f: (f / "index.json").write_bytes(b"[" * 100_000),
            "index.json: damaged, not the JSON",
        ),
        (lambda f: edit_index(f, version=9), "index.json: has format version 9"),
        (lambda f: edit_index(f, dtype="uint32"), "index.json: not in the form that this version"),
        (
            lambda f: edit_index(f, shards=[{"name": "../x"}]),
            "index.json: not in the form that this version",
        ),
        (lambda f: edit_index(f, shards=None), "index.json: not in the form that this version"),
        (lambda f: edit_index(f, vocab_size=200), "has id 256, the vocabulary ends at 199"),
        (lambda f: (f / "val-00000.bin").unlink(), "val-00000.bin: is missing"),
        (lambda f: os.truncate(f / "train-00000.bin", 100), "train-00000.bin: has 100 bytes"),
        (lambda f: (f / "train-00001.bin").write_bytes(b"ab"), "train-00001.bin: is not in"),
    ],
)
def test_damage_is_noticed_at_opening(prepared, spoil, message):
    spoil(prepared.folder)
    with pytest.raises(CorruptError) as caught:
        shards.open_corpus(prepared.folder)
    assert message in str(caught.value)


def test_every_bit_of_the_index_counts(prepared):
    path = prepared.folder / "index.json"
    data = path.read_bytes()
    for at in range(0, len(data), 37):
        changed = bytearray(data)
        changed[at] ^= 4
        path.write_bytes(changed)
        with pytest.raises(CorruptError, match="index.json"):
            shards.open_corpus(prepared.folder)


def test_a_document_that_changes_while_it_is_read(source):
    text = split.survey(documents.find([str(source)]), "strict", False)
    plan = split.split(text, 0.1)
    (source / "003.txt").write_text("something else")
    with pytest.raises(UsageError, match="003.txt: changed"):
        list(split.parts(text, plan))
    text = split.survey(documents.find([str(source)]), "strict", False)
    (source / "019.txt").write_text("")
    with pytest.raises(UsageError, match="a document disappeared"):
        list(split.parts(text, plan))


def test_a_failure_leaves_nothing_behind(monkeypatch, source, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_index", full)
    with pytest.raises(OSError, match="No space"):
        make(source, tmp_path / "deep" / "c")
    assert list((tmp_path / "deep").iterdir()) == []


def test_two_processes_at_once_share_the_cache(monkeypatch, source, tmp_path):
    cache = tmp_path / "cache"
    other = make(source, None, cache_dir=tmp_path / "elsewhere")
    finish = shards.write_index

    def late(folder, content):
        finish(folder, content)
        shutil.copytree(other.folder, cache / other.folder.name)

    monkeypatch.setattr(shards, "write_index", late)
    assert make(source, None, cache_dir=cache).tokens == other.tokens
    assert [path.name for path in cache.iterdir()] == [other.folder.name]


def test_preparing_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, minillm.data.prepare; sys.exit('torch' in sys.modules)"
    root = Path(prepare_file.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


BAD = [
    (["missing.txt"], 2, "missing.txt: no such file or folder"),
    (["fine.txt/below"], 2, "fine.txt/below: no such file or folder"),
    ([""], 2, "'' is not a path"),
    (["*.nothing"], 2, "*.nothing: no file matches"),
    (["empty.txt"], 2, "empty.txt: no text"),
    (["blank.txt"], 2, "blank.txt: no text"),
    (["one.txt"], 2, "1 characters are too few"),
    (["empty_folder"], 2, "empty_folder: no text in this folder"),
    (["no_text"], 2, "no_text: no text in this folder"),
    (["utf16.txt"], 2, "utf16.txt: is UTF-16"),
    (["latin1.txt"], 2, "latin1.txt: byte 0xe9 at offset 3 is not UTF-8"),
    (["nul.txt"], 2, "nul.txt: NUL byte at offset 4"),
    (["packed.txt"], 2, "packed.txt: is gzip data"),
    (["program"], 2, "program: is a binary program"),
    (["rows.jsonl"], 2, "rows.jsonl:2: not a JSON object"),
    (["bad.jsonl.gz"], 3, "bad.jsonl.gz: damaged gzip data"),
    (["pipe"], 2, "pipe: not a regular file"),
    (["/dev/zero"], 2, "/dev/zero: not a regular file"),
    (["loop"], 2, "loop: Too many levels of symbolic links"),
    (["x" * 300], 2, "File name too long"),
    (["new\nline"], 2, "new line: no such file"),
    (["caf\udce9"], 2, "no such file or folder"),
    (["same"], 2, "all 2 documents are the same text"),
    (["fine.txt", "--tokenizer", "wordpiece"], 2, "--tokenizer wordpiece: no such file"),
    (["fine.txt", "--tokenizer", "rubbish.model"], 3, "rubbish.model: not a SentencePiece model"),
    (["fine.txt", "--tokenizer", "hf.json"], 2, "hf.json: not a tokenizer of minillm"),
    (["fine.txt", "--tokenizer", "char", "--vocab-size", "9"], 2, "--vocab-size is for bpe"),
    (["fine.txt", "--tokenizer", "byte", "--vocab-size", "9"], 2, "has 257 tokens"),
    (["fine.txt", "--vocab-size", "0"], 2, "0 is out of range"),
    (["fine.txt", "--vocab-size", "100"], 2, "--vocab-size 100: bpe takes 320"),
    (["fine.txt", "--vocab-size", "many"], 2, "'many' is not a whole number"),
    (["fine.txt", "--val-fraction", "0.9"], 2, "0.9 is out of range"),
    (["fine.txt", "--val-fraction", "nan"], 2, "'nan' is not a finite number"),
    (["fine.txt", "--workers", "0"], 2, "0 is out of range"),
    (["fine.txt", "--errors", "ignore"], 2, "'ignore' is not one of strict, replace"),
    (["fine.txt", "--out", "fine.txt"], 2, "fine.txt: exists and is not this corpus"),
    (["same", "fine.txt", "--out", "same"], 2, "same: exists and is not this corpus"),
    (["fine.txt", "--out"], 2, "expected one argument"),
    (["fine.txt", "--out", "a", "--out", "b"], 2, "--out is given twice"),
    (["fine.txt", "--vocabsize", "9"], 2, "did you mean --vocab-size?"),
    (["corrupt"], 3, "index.json: damaged, not the JSON"),
]


@pytest.fixture
def bad_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {
        "fine.txt": b"some fine text\n" * 20,
        "empty.txt": b"",
        "blank.txt": b" \n\t\n",
        "one.txt": b"x",
        "utf16.txt": "text".encode("utf-16"),
        "latin1.txt": b"caf\xe9",
        "nul.txt": b"text\0",
        "packed.txt": b"\x1f\x8b\x08\0",
        "program": b"\x7fELF\x02",
        "rows.jsonl": b'{"text": "a"}\n{text}\n',
        "bad.jsonl.gz": b"not gzip",
        "rubbish.model": b"rubbish" * 9,
        "hf.json": b'{"version": "1.0", "added_tokens": []}',
        "no_text/picture.png": b"x",
        "same/a.txt": b"same",
        "same/b.txt": b"same",
        "corrupt/index.json": b"{}",
        "corrupt/train-00000.bin": b"",
    }
    for name, data in content.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(data)
    Path("empty_folder").mkdir()
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    return tmp_path


@pytest.mark.parametrize("argv, code, message", BAD, ids=[f"{a}"[:40] for a, _, _ in BAD])
def test_bad_input_is_one_line(bad_place, capsys, argv, code, message):
    before = sorted(bad_place.rglob("*"))
    assert run("minillm prepare", command.main, argv) == code
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("minillm prepare: error: ")
    assert message in err
    assert out == ""
    assert sorted(bad_place.rglob("*")) == before


def test_unreadable_file_is_an_io_error(bad_place, capsys, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    # Not chmod: root reads everything.
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert run("minillm prepare", command.main, ["fine.txt"]) == 5
    assert capsys.readouterr().err == "minillm prepare: error: fine.txt: Permission denied\n"


def test_the_command_prepares_and_says_where(bad_place, capsys):
    argv = ["fine.txt", "latin1.txt", "--errors", "replace", "--out", "made", "--tokenizer=byte"]
    assert run("minillm prepare", command.main, argv) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "made: 2 documents and 1 held out, 306 bytes, 309 tokens" in err
    assert shards.open_corpus("made").documents == {"train": 2, "val": 1}
    assert run("minillm prepare", command.main, ["fine.txt", "--tokenizer", "byte"]) == 0
    assert "data/prepared/" in capsys.readouterr().err
