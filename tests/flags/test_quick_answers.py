"""Help, versions and refusals need no torch, so they come within a tenth of a second."""

import ast
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from minillm import __version__
from minillm.flags import profile
from minillm.profiling.catalogue.problem import CATALOGUE

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the checkout")

HEAVY = ("torch", "numpy", "sentencepiece", "triton", "tqdm", "safetensors")
# Runs each command line as the program would be started, in a process forked from one that has
# imported nothing, and prints what came of it: the exit code, and the heavy modules imported.
PROGRAM = """
import contextlib, io, json, os, runpy, sys, time

def outcome(words):
    sys.argv = words
    sys.path.insert(0, ROOT)
    code, out = 0, io.StringIO()
    start = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            if words[0] == "minillm":
                runpy.run_module("minillm", run_name="__main__", alter_sys=False)
            else:
                runpy.run_path(os.path.join(ROOT, words[0]), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    heavy = sorted(set(HEAVY) & sys.modules.keys())
    return [code, heavy, out.getvalue(), time.process_time() - start]

for words in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, json.dumps(outcome(words)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        print(answer.read(), flush=True)
    os.wait()
"""
ANSWERS = [
    # Exit code, words.
    *((0, [name, word]) for name in ("train.py", "sample.py") for word in ("--help", "--version")),
    *((0, ["minillm", verb, "--help"])
      for verb in ("train", "sample", "prepare", "plan", "profile")),
    *((0, ["minillm", word]) for word in ("--help", "--version")),
    (2, ["minillm"]),
    (2, ["minillm", "trian"]),
    (2, ["train.py", "--wibble"]),
    (2, ["train.py", "--n-head", "x"]),
    (2, ["train.py", "--n-head", "3", "--d-model", "128"]),
    (2, ["train.py", "--preset", "huge"]),
    (2, ["train.py", "--config", "none.json"]),
    (2, ["train.py", "--config", "wrong.json"]),
    (2, ["train.py", "--data", "none.txt"]),
    (2, ["train.py", "--steps", "5", "--epochs", "2"]),
    (2, ["train.py", "--resume", "r", "--out", "r"]),
    (2, ["train.py", "--resume", "none"]),
    (2, ["train.py", "--device", "tpu"]),
    (2, ["sample.py", "none"]),
    (2, ["sample.py", "--device", "tpu"]),
    (2, ["sample.py", "--wibble"]),
    (2, ["sample.py", "--temperature", "-1"]),
    (2, ["sample.py", "--prompt", "a", "--interactive"]),
    (2, ["sample.py", "--exit-patience", "2"]),
    (2, ["minillm", "plan", "--gpus", "0"]),
    (2, ["minillm", "plan", "--n-head", "3", "--d-model", "128"]),
    (2, ["minillm", "prepare", "none.txt"]),
    (2, ["minillm", "profile", "--op", "none"]),
    (2, ["minillm", "profile", "--suite", "none"]),
]  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_help_versions_and_refusals_import_no_torch(tmp_path):
    (tmp_path / "wrong.json").write_text('{"stpes": 3}')
    program = f"ROOT, HEAVY = {str(ROOT)!r}, {HEAVY!r}\n{PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps([words for _, words in ANSWERS])],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(ANSWERS)
    for (code, words), (given, heavy, text, _) in zip(ANSWERS, found, strict=True):
        assert (given or 0, heavy) == (code, []), (words, text)
        assert "Traceback" not in text, text
        if words[-1] == "--version":
            assert text == f"minillm {__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["--wibble"]], ids=" ".join)
def test_an_answer_takes_little_processor_time(words, tmp_path):
    """At most 0.3 s, the median of five, of a new process each."""
    seconds = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, ROOT / "train.py", *words], cwd=tmp_path,
                       capture_output=True, timeout=60)  # fmt: skip
        after = os.times()
        seconds.append(
            after.children_user + after.children_system
            - before.children_user - before.children_system
        )  # fmt: skip
    assert statistics.median(seconds) < 0.3


@pytest.mark.slow
def test_one_process_imports_no_fsdp():
    """FSDP takes a second to import, and only stage 3 on several ranks needs it."""
    code = (
        "import sys; import minillm.scripts.train; print('torch.distributed.fsdp' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "False\n", done.stderr


def test_fsdp_is_imported_where_it_is_used():
    """No file but fsdp.py itself imports it when it is imported."""
    for path in (ROOT / "minillm").rglob("*.py"):
        if path.name != "fsdp.py":
            at_once = [node for node in ast.parse(path.read_text("utf-8")).body
                       if isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
            assert not any("fsdp" in ast.unparse(node) for node in at_once), path


def test_profiles_operations_are_those_that_have_sizes():
    assert set(profile.OPERATIONS) == set(CATALOGUE)
