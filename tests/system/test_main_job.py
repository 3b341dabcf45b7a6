"""The main job, as a newcomer runs it, on this Python's own source files."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from minillm.checkpoint.run_folder import RunFolder
from minillm.data.batches import Tokens
from minillm.data.shards import Corpus, open_corpus

README = Path(__file__).resolve().parents[2] / "README.md"


def held_out_text(corpus: Corpus) -> bytes:
    """The bytes of all held-out documents, one after the other."""
    tokens = Tokens(corpus, "val")
    return corpus.tokenizer().decode_bytes(tokens.read(0, len(tokens)).tolist())


def run(*words: str | Path, **variables: str) -> subprocess.CompletedProcess:
    """A verb of minillm in a process of its own, with the machine's own number of threads."""
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, "-m", "minillm", *map(str, words)],
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip


@pytest.mark.slow
def test_a_short_run_beats_gzip(tmp_path):
    """Validation bits a byte, over every held-out byte, are fewer than gzip -9 needs.

    By steps, not by time, and with one thread: a neighbour shall not decide it. Half a minute.
    """
    out, cache = tmp_path / "run", tmp_path / "cache"
    trained = run("train", "--steps", "160", "--threads", "1", "--out", out, "--cache-dir", cache)
    assert trained.returncode == 0, trained.stderr
    corpus = open_corpus(RunFolder(out).corpus())
    text = held_out_text(corpus)
    assert len(text) == corpus.bytes["val"] > 100_000
    gzip_bpb = 8 * len(zlib.compress(text, 9)) / len(text)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val_tokens"] == corpus.tokens["val"] - 1
    assert last["val_bpb"] < gzip_bpb, f"{last['val_bpb']} against {gzip_bpb}\n{trained.stderr}"
    sampled = run("sample", out, "--prompt", "def ")
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.startswith("def ") and len(sampled.stdout.strip()) > len("def ")
    assert not sampled.stdout.startswith("def  ")


@pytest.mark.slow
@pytest.mark.skipif(not README.is_file(), reason="the README is not here")
def test_interpreted_kernels_train_as_eager_does(tmp_path):
    """The README's command, and the same with eager kernels: losses equal within 1e-4."""
    pytest.importorskip("triton")
    (block,) = (b for b in README.read_text("utf-8").split("```") if "TRITON_INTERPRET=1" in b)
    _, command = block.replace("\\\n", " ").split("train.py", 1)
    losses = []
    for kernels in ("triton", "eager"):
        words = command.replace("--kernels triton", f"--kernels {kernels}").split()
        out, cache = tmp_path / kernels, tmp_path / "cache"
        flags = ("--out", out, "--cache-dir", cache)
        result = run("train", *words, *flags, TRITON_INTERPRET="1")
        assert result.returncode == 0, result.stderr
        assert f"{kernels} kernels (asked for)" in result.stderr + result.stdout
        rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-4)
