"""benchmarks/recurrence/speculation.py: texts that differ are errors in fp32, else counted."""

import importlib.util
import sys
from pathlib import Path

import pytest

from minillm.inference.decoding_batch import Token

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "recurrence" / "speculation.py"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="the source tree is not here")


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("speculation", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TOKENS", 6)
    monkeypatch.setattr(module, "ROUNDS", 2)
    return module


@pytest.fixture(scope="module")
def run(train, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "core"
    assert train("--out", run, "--steps", "1", "--recurrent", "1,1,1") == 0
    return run


def table(bench, monkeypatch, run, out, *words) -> list[str]:
    words = ["speculation.py", run, "--recurrence", 3, "--out", out, *words]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    bench.main()
    (path,) = out.iterdir()
    return [path.name, *path.read_text().splitlines()]


@pytest.mark.slow
def test_a_device_and_a_dtype(bench, monkeypatch, run, tmp_path):
    name, head, _, *lines = table(bench, monkeypatch, run, tmp_path)
    assert name == "speculation.md" and head.endswith("texts that differ |")
    assert len(lines) == 6 and all(line.endswith("| 0 of 2 |") for line in lines)


def test_other_texts_are_an_error_in_fp32_alone(bench, monkeypatch, run, tmp_path):
    def wrong(model, prompts, params, *, tally, **_):
        tally.drafted = 1
        yield from (Token(0, 1, 0.0, 3) for _ in range(params.max_tokens + 1))

    monkeypatch.setattr(bench, "speculate", wrong)
    with pytest.raises(AssertionError, match="speculation changed the text"):
        table(bench, monkeypatch, run, tmp_path)
    name, _, _, *lines = table(
        bench, monkeypatch, run, tmp_path, "--device", "cpu", "--dtype", "bf16"
    )
    assert name == "speculation-cpu-bf16.md"
    assert len(lines) == 6 and all(line.endswith("| 2 of 2 |") for line in lines)
