"""Whole profile on a GPU, once: nothing is missing, none of our kernels fails, no result is wrong.

How fast anything is, a test does not say.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillm.profiling.catalogue.problem import CATALOGUE
from minillm.profiling.timing import machine

HOME = Path(machine.__file__).resolve().parents[3]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict]:
    """Return the finished process, and its results."""
    folder = tmp_path_factory.mktemp("profile")
    words = ["--suite", "all", "--quick", "--device", "cuda", "--out", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "minillm", "profile", *words], capture_output=True, text=True,
        cwd=HOME, env={**os.environ, "PYTHONPATH": str(HOME)}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done, json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_every_suite_leaves_rows_and_files(profiled):
    done, results = profiled
    assert list(results["suites"]) == ["kernels", "model", "decode", "roofline", "audit"]
    assert all(results["suites"].values()) and "earlier" not in results
    for name in ("results.json", "kernels.csv", "index.html", "audit.md"):
        assert any(s.startswith("wrote ") and s.endswith(name) for s in done.stderr.splitlines())


def test_our_kernels_are_timed_and_right(profiled):
    rows = profiled[1]["suites"]["kernels"]
    ours = [row for row in rows if row["implementation"] == "triton"]
    assert {row["op"] for row in ours} == set(CATALOGUE)
    for row in ours:
        assert row["median_us"] > 0 and row["note"] == "" and row["error"] < 0.1, row
        assert row["percent_of_ceiling"] > 0 and row["peak_bytes"] is not None, row
    assert not [row for row in rows if row["note"].startswith("wrong numbers")]


def test_attention_is_compared_with_the_vendors(profiled):
    done, results = profiled
    ways = {r["direction"] for r in results["suites"]["kernels"] if r["op"] == "attention"}
    assert ways == {"forward", "backward", "forward+backward"}
    at = done.stdout.splitlines().index("attention, times as fast as")
    assert "flash" in done.stdout.splitlines()[at + 1]


def test_the_model_and_decoding_run_on_our_kernels(profiled):
    suites = profiled[1]["suites"]
    model = {row["implementation"]: row for row in suites["model"]}
    assert model["triton"]["step_ms"] > 0
    assert model["triton"]["loss"] == pytest.approx(model["eager"]["loss"], rel=0.05)
    decode = [row for row in suites["decode"] if row["implementation"] == "triton"]
    assert decode and all(row["tokens_per_s"] > 0 for row in decode)
    assert not [row for row in suites["audit"] if row["error"]]
