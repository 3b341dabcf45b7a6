"""More bad input: plan, prepare, profile, prompts, settings in files, and what only looks bad."""

import os
from pathlib import Path

import pytest
import torch

from minillm.commands import prepare
from minillm.data import prepare as corpus
from minillm.data.shards import open_corpus
from minillm.runtime import program
from minillm.scripts import sample
from tests.support.refusals import refusal

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
LINKS = ["--gpus", "2", "--links"]
H100 = ["--gpu", "h100", "--gpus"]
CASES = [
    # Command, words, a part of the message; the code is 2.
    ("plan", ["--flops", "0"], "0 is not above 0"),
    ("plan", ["--flops", "nan"], "'nan' is not a finite number"),
    ("plan", ["--flops", "1e400"], "'1e400' is not a finite number"),
    ("plan", ["--memory-gbs", "-3"], "-3.0 is out of range; expected at least 0"),
    ("plan", ["--host-gbs", "inf"], "'inf' is not a finite number"),
    ("plan", ["--mfu", "1.1"], "1.1 is out of range; expected between 0 and 1"),
    ("plan", ["--overlap", "2"], "2.0 is out of range"),
    ("plan", ["--latency-us", "-1"], "-1.0 is out of range"),
    ("plan", ["--gpus", "0"], "0 is out of range; expected between 1 and"),
    ("plan", ["--gpus", "1.5"], "'1.5' is not a whole number"),
    ("plan", [*H100, "4", "--node-gpus", "3", "--batch-size", "8"], "does not fill nodes of"),
    ("plan", [*H100, "2", "--batch-size", "7"], "not divisible by 2 ranks; nearest: 8"),
    ("plan", [*LINKS, "torn.json"], "torn.json: not what benchmarks/zero/fit.py writes"),
    ("plan", [*LINKS, "deep.json"], "deep.json: not what benchmarks/zero/fit.py writes"),
    ("plan", [*LINKS, "bytes.toml"], "bytes.toml: not what benchmarks/zero/fit.py writes"),
    ("plan", [*LINKS, "folder"], "folder: not a regular file"),
    ("plan", [*LINKS, "torn.json", "--latency-us", "1"], "exclude each other"),
    ("plan", ["--gpuss", "2"], "did you mean --gpus?"),
    ("plan", ["--json", "--json"], "--json is given twice"),
    ("plan", ["--json=yes"], "--json: takes no value; got 'yes'"),
    ("plan", ["--print-config"], "--print-config is train.py's; leave it out"),
    ("plan", ["--offload"], "--offload needs --zero 1 or --zero 2"),
    ("plan", ["--data", ""], "--data is empty"),
    ("plan", ["--data", "none.txt"], "none.txt: no such file or folder"),
    ("profile", ["--threads", "0"], "0 is out of range"),
    ("profile", ["--threads", "9" * 20], "is out of range; expected between 1 and 4096"),
    ("profile", ["--device", "tpu"], "--device 'tpu' is not one of auto, cpu, cuda"),
    ("profile", ["--device", ""], "--device '' is not one of"),
    ("profile", ["--device", "mps"], "no kernels to compare there; use --device cpu"),
    ("profile", ["--op", ""], "not one of attention"),
    ("profile", ["--op", "atention"], "sample; did you mean attention?"),
    ("profile", ["--tune", "atention"], "did you mean attention?"),
    ("profile", ["--suite", "kernel"], "'kernel' is not one of kernels, model"),
    ("profile", ["--suite", "kernel"], "all; did you mean kernels?"),
    ("profile", ["--suite", "speed"], "roofline, all; see --help"),
    ("profile", ["--dtype", "fp31"], "did you mean fp32?"),
    ("prepare", ["text.txt", "--errors", "repalce"], "did you mean replace?"),
    ("plan", ["--gpus", "0"], "expected between 1 and 1000000;"),
    ("plan", ["--batch-size", "0"], "expected between 1 and 16777216;"),
    ("profile", ["--suite"], "argument --suite: expected one argument"),
    ("profile", ["--trace", ""], "'' is not a path"),
    ("profile", ["--trace", "text.txt/x"], "text.txt is not a folder"),
    ("profile", ["--quick", "--quick"], "--quick is given twice"),
    ("prepare", [""], "'' is not a path"),
    ("prepare", ["text.txt", "--tokenizer", ""], "--tokenizer is empty; expected bpe, char"),
    ("prepare", ["text.txt", "--out", ""], "'' is not a path"),
    ("prepare", ["text.txt", "--vocab-size", "1"], "--vocab-size 1: bpe takes 320"),
    ("prepare", ["text.txt", "--vocab-size", "5000000"], "5000000 is out of range"),
    ("prepare", ["wide.txt"], "wide.txt: is UTF-16; convert it to UTF-8"),
    ("prepare", ["wider.txt"], "wider.txt: is UTF-32; convert it to UTF-8"),
    ("prepare", ["picture.txt"], "picture.txt: NUL byte at offset 8"),
    ("prepare", ["late.txt"], "late.txt: byte 0xff at offset 70000 is not UTF-8"),
    ("prepare", ["folder"], "folder: no text in this folder"),
    ("prepare", ["text.txt", "--out", "text.txt"], "text.txt: exists and is not this corpus"),
    ("train", ["--config", "wide.json"], "not UTF-8 text at byte 0"),
    ("train", ["--config", "deep.toml"], "nested too deeply"),
    ("train", ["--config", "deep.json"], "nested too deeply"),
    ("train", ["--config", "large.json"], "larger than 1 MiB"),
    ("train", ["--config", "marked.json"], "steps: 0 is out of range"),  # a BOM is no error
    ("train", ["--config", "digits.json"], "a number has too many digits"),
    ("train", ["--config", "infinite.toml"], "'inf' is not a finite number"),
    ("train", ["--config", "float.json"], "steps = 1000000000.0 is a float, expected a whole"),
    ("train", ["--config", "escape.json"], r"unknown setting 'k\x1b[31m\n'"),
    ("train", ["--config", "name.json"], "...k"),
    ("train", ["--config", "folder"], "folder: not a regular file"),
    ("train", ["--n-layer", "10001"], "10001 is out of range; expected between 1 and 10000"),
    ("train", ["--batch-size", str(1 << 24), "--micro-batch-size", "3"], "nearest: 4"),
    ("train", ["--batch-size", "0"], "0 is out of range"),
    ("train", ["--window", "-1"], "-1 is out of range"),
    ("train", ["--rope-base", "0"], "0.0 is out of range; expected at least 1"),
    ("train", ["--logit-softcap", "-1"], "-1.0 is out of range"),
    ("train", ["--grad-clip", "nan"], "'nan' is not a finite number"),
    ("train", ["--beta1", "1"], "1.0 is out of range"),
    ("train", ["--warmup", "-1"], "-1 is out of range"),
    ("train", ["--keep-last", "0"], "0 is out of range"),
    ("train", ["--time-limit", "0"], "'0' is not a duration such as 90s"),
    ("train", ["--time-limit=-5m"], "'-5m' is not a duration"),
    ("train", ["--recurrent", "1,0,1"], "with a core of at least one block"),
    ("train", ["--recurrent", "1,2"], "'1,2' is not PRELUDE,CORE,CODA"),
    ("train", ["--recurrent", "0,9999,9999"], "19998 blocks; at most 10000"),
    ("train", ["--recurrent", "1,2,1", "--mean-recurrence", "0"], "0 is out of range"),
    ("train", ["--recurrent", "1,2,1", "--max-recurrence", "4"], "4 is below --mean-recurrence 8"),
    ("train", ["--mean-recurrence", "4"], "needs a recurrent model; add --recurrent P,R,C"),
    ("train", ["--val-fraction", "0.6"], "0.6 is out of range"),
    ("train", ["--position", "alibi", "--n-head", "7", "--d-model", "32"], "nearest: 8"),
]
NO_DEVICE = [("plan", ["--device", "cuda"]), ("profile", ["--device", "cuda"]),
             ("profile", ["--device", "cuda:99"]), ("profile", ["--tune"])]  # fmt: skip
FULL_NAME = {"train": "train.py"}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder to stand in, with bad content under plain names."""
    monkeypatch.chdir(tmp_path)
    return with_bad_files(tmp_path)


def with_bad_files(folder: Path) -> Path:
    (folder / "folder").mkdir()
    content = {
        "text.txt": b"the cat sat on a mat\n" * 400,
        "wide.txt": "text".encode("utf-16"),
        "wider.txt": "text".encode("utf-32"),
        "picture.txt": b"\x89PNG\r\n\x1a\n\0\1\2",
        "late.txt": b"a" * 70_000 + b"\xff",
        "torn.json": b'{"worlds": ',
        "deep.json": b"[" * 100_000,
        "deep.toml": b"a = " + b"[" * 100_000,
        "bytes.toml": b"\xff\xfe\0",
        "wide.json": '{"steps": 1}'.encode("utf-16"),
        "large.json": b" " * (1 << 20) + b"{}",
        "marked.json": b'\xef\xbb\xbf{"steps": 0}',
        "digits.json": b'{"steps": ' + b"9" * 5000 + b"}",
        "infinite.toml": b"grad_clip = inf\n",
        "float.json": b'{"steps": 1e9}',
        "escape.json": b'{"k\\u001b[31m\\n": 1}',
        "name.json": b'{"' + b"k" * 600 + b'": 1}',
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("verb, words, fragment", CASES)
def test_refused_in_one_line(here, capfd, verb, words, fragment):
    before = sorted(here.rglob("*"))
    assert fragment in refusal(FULL_NAME.get(verb, f"minillm {verb}"), words, 2, capfd)
    assert sorted(here.rglob("*")) == before


@NO_GPU
@pytest.mark.parametrize("verb, words", NO_DEVICE)
def test_no_device(here, capfd, verb, words):
    line = refusal(f"minillm {verb}", words, 4, capfd)
    assert "use --device cpu" in line or "there is none here" in line


PROMPTS = ["", "<|endoftext|></s><s>", "\u202e\U0001f468\u200d\U0001f469", "a\0b", "x" * 5000]


@pytest.mark.parametrize("prompt", PROMPTS, ids=ascii)
def test_a_prompt_is_plain_text(tiny_run, capfd, prompt):
    words = [str(tiny_run), "--prompt", prompt, "--max-tokens", "3", "--threads", "1"]
    assert program.run("sample.py", sample.main, words) == 0
    out, err = capfd.readouterr()
    assert out.startswith(prompt) and "3 tokens in" in err
    # Bytes are tokens here, and the mark of a document comes first.
    assert ("5001 tokens long; only its last 8 are read" in err) == (len(prompt) > 1000)


EDGES = [
    ["--temperature", "1e-30"], ["--temperature", "1e300"], ["--top-k", "1000000000"],
    ["--top-p", "1e-300"], ["--min-p", "1"], ["--repetition-penalty", "100"],
]  # fmt: skip


@pytest.mark.parametrize("words", EDGES, ids=" ".join)
def test_an_extreme_that_is_fine(tiny_run, capfd, words):
    words = [str(tiny_run), *words, "--max-tokens", "3", "--threads", "1"]
    assert program.run("sample.py", sample.main, words) == 0
    assert "3 tokens in" in capfd.readouterr().err


@pytest.mark.parametrize(
    "name, data, fragment",
    [
        ("wide.txt", "text".encode("utf-16"), "not UTF-8 at byte 0"),
        ("packed.gz", b"\x1f\x8b\x08", "not UTF-8 at byte 1"),
        ("huge.txt", None, "larger than 100 MiB; give its end alone"),
    ],
)
def test_prompt_files(tiny_run, tmp_path, capfd, name, data, fragment):
    path = tmp_path / name
    path.write_bytes(data or b"")
    if data is None:
        os.truncate(path, (100 << 20) + 1)
    words = [str(tiny_run), "--prompt-file", str(path)]
    assert program.run("sample.py", sample.main, words) == 2
    assert fragment in capfd.readouterr().err.splitlines()[-1]


def test_a_mark_at_the_start_of_a_prompt_file_is_not_read(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfhi")
    assert sample.read_prompt(tmp_path / "p.txt") == "hi"


FINE = {
    "one long line": (b"a" * 300_000, ["--tokenizer", "byte"], 257),
    "one long line, bpe": (b"ab" * 100_000, ["--vocab-size", "512"], None),
    "CRLF": (b"one line\r\n" * 40, ["--tokenizer", "byte"], 257),
    "terminal escapes": (b"\x07\x1b[31m" * 40, ["--tokenizer", "byte"], 257),
    "a vocabulary it cannot fill": (b"the cat sat. " * 40, ["--vocab-size", "70000"], None),
    "bad bytes, replaced": (b"caf\xe9 " * 40, ["--errors", "replace", "--tokenizer", "byte"], 257),
}


@pytest.mark.parametrize("data, words, vocabulary", FINE.values(), ids=FINE)
def test_text_that_only_looks_bad(here, capfd, data, words, vocabulary):
    Path("odd.txt").write_bytes(data)
    argv = ["odd.txt", "--out", "made", "--workers", "1", *words]
    assert program.run("minillm prepare", prepare.main, argv) == 0
    made = open_corpus("made")
    assert vocabulary in (None, made.vocab_size) and made.vocab_size < 600
    text = data.decode("utf-8", "replace").encode()
    assert sum(made.bytes.values()) == len(text)
    said = capfd.readouterr().err
    assert "\x1b" not in said and "made: 1 document and 1 held out" in said


@pytest.mark.parametrize(
    "change, fragment",
    [
        (lambda path: path.unlink(), "text.txt: disappeared while it was being read"),
        (lambda path: path.write_bytes(path.read_bytes() * 2), "text.txt: changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:99]), "text.txt: changed"),
        (lambda path: path.write_bytes(b"\xff" * 50), "byte 0xff at offset 0 is not UTF-8"),
    ],
    ids=["deleted", "grown", "shrunk", "spoilt"],
)
def test_a_file_that_changes_while_it_is_read(here, capfd, monkeypatch, change, fragment):
    split = corpus.split

    def late(*args):
        change(Path("text.txt"))
        return split(*args)

    monkeypatch.setattr(corpus, "split", late)
    words = ["text.txt", "--tokenizer", "byte", "--out", "made"]
    assert fragment in refusal("minillm prepare", words, 2, capfd)
    assert not Path("made").exists()
