"""benchmarks/gpu.py: a part that hangs or crashes costs its own time, and wrong results show.

The quick tests give the parent parts of a few lines. The slow one runs all real parts on a CPU.
"""

import datetime
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillm.ops import EAGER, OPERATIONS

device_parts = pytest.importorskip("benchmarks.device_parts")  # not there where a wheel is tested
from benchmarks.device_parts import cases, correctness, tests as tests_part  # noqa: E402

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="the source tree is not here")

# Programs of parts. `emit` appends a row to the file of rows, as session.py does.
EMIT = """
import json, os, subprocess, sys, time
def emit(**row):
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps({"part": "x", **row}) + "\\n")
"""
PROGRAMS = {
    "good": "emit(figure=1.5); emit(figure=2.5); print('a line of good')",
    "hangs": "emit(figure=1); child = subprocess.Popen(['sleep', '60']); emit(child=child.pid); "
    "time.sleep(60)",
    "crashes": "emit(figure=1); print('last words'); sys.stdout.flush(); os.abort()",
    "wrong": "emit(verdict='right', op='rope'); emit(verdict='WRONG forward', op='adamw')",
    "unchecked": "emit(verdict='not checked', op='rope')",
    "torn": "emit(figure=1); open(sys.argv[1], 'a').write('{\"figure\": ')",
    "correctness": "time.sleep(60)",
}
SLEEP = ("hangs", "correctness")  # stopped at a limit of 1.5 s


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_script", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(gpu, tmp_path):
    """run(*names) -> the exit code and results.json of these parts."""

    def run(*names: str, total: float = 100) -> tuple[int, dict]:
        known = [gpu.Part(name, 1.5 if name in SLEEP else 60, "") for name in PROGRAMS]

        def command(part, limit, scratch, args):
            program = EMIT + PROGRAMS[part.name]
            return [sys.executable, "-S", "-c", program, str(args.out / "rows.jsonl")]

        words = ["--parts", ",".join(names), "--total", str(total), "--out", str(tmp_path)]
        code = gpu.main(words, known, command)
        return code, json.loads((tmp_path / "results.json").read_text())

    return run


def ends(pid: int) -> bool:
    """Return whether a process ends within some seconds; a zombie has ended."""
    for _ in range(100):
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_a_part_that_hangs_is_stopped_with_its_children_and_its_rows_are_kept(run):
    start = time.monotonic()
    code, parts = run("hangs", "good")
    assert time.monotonic() - start < 30
    assert parts["hangs"]["state"].startswith("stopped at its limit")
    (figure, child) = parts["hangs"]["rows"]
    assert figure == {"figure": 1} and ends(child["child"])
    assert parts["good"]["state"] == "done" and len(parts["good"]["rows"]) == 2
    assert code == 0


def test_a_part_that_crashes_is_reported_with_its_last_lines(run, tmp_path):
    code, parts = run("crashes", "good")
    assert code == 1
    assert parts["crashes"]["state"].startswith("crashed with exit code -")
    assert parts["crashes"]["rows"] == [{"figure": 1}]
    assert parts["crashes"]["tail"] == ["last words"]
    assert "last words" in (tmp_path / "report.txt").read_text()
    assert parts["good"]["state"] == "done" and parts["good"]["tail"] == []


def test_wrong_results_come_first_and_make_the_exit_code_1(run, tmp_path, capsys):
    code, _ = run("good", "wrong")
    report = (tmp_path / "report.txt").read_text()
    assert code == 1
    assert report.splitlines()[:2] == ["FAULTS", "wrong: verdict=WRONG forward  op=adamw"]
    assert report in capsys.readouterr().out


def test_what_was_not_checked_is_a_fault(run, tmp_path):
    assert run("unchecked")[0] == 1
    report = (tmp_path / "report.txt").read_text()
    assert report.splitlines()[1] == "unchecked: verdict=not checked  op=rope"


def test_correctness_that_does_not_finish_is_a_fault(run, tmp_path):
    assert run("correctness")[0] == 1
    assert "correctness: stopped" in (tmp_path / "report.txt").read_text().splitlines()[1]


def test_a_row_cut_short_is_left_out(run):
    assert run("torn")[1]["torn"]["rows"] == [{"figure": 1}]


def test_a_second_command_adds_to_the_folder(run, tmp_path):
    run("good")
    code, parts = run("torn")
    assert code == 0 and list(parts) == ["good", "torn"]
    assert parts["good"]["rows"] == [{"figure": 1.5}, {"figure": 2.5}]
    assert "a line of good" in (tmp_path / "log.txt").read_text()


def test_without_time_left_no_part_is_started(run):
    code, parts = run("good", total=3)
    assert code == 0 and parts["good"]["state"] == "not started: no time left"


def test_an_unknown_part_is_refused(gpu, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        gpu.main(["--parts", "speed", "--out", str(tmp_path)])
    assert refused.value.code == 2 and "speed" in capsys.readouterr().err


NVIDIA_SMI = "import sys; assert sys.argv[1] == '--query-gpu=name'; print({name!r})"


@pytest.mark.parametrize("name", ["NVIDIA H200\nNVIDIA H200", ""])
def test_results_go_to_a_folder_of_the_device_and_date(gpu, tmp_path, monkeypatch, capsys, name):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable} -S\n" + NVIDIA_SMI.format(name=name))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if name:
        args = gpu.parse(["--parts", "second"], [part.name for part in gpu.PARTS])
        today = datetime.date.today().isoformat()
        assert args.out == FILE.parent / f"nvidia-h200-{today}"
        assert args.total == 250 and args.parts == ["environment", "tests", "compile"]
    else:
        with pytest.raises(SystemExit):
            gpu.parse([], [part.name for part in gpu.PARTS])
        assert "--dry" in capsys.readouterr().err


def test_sets_name_parts_that_exist(gpu):
    names = {part.name for part in gpu.PARTS}
    for words, seconds in gpu.SETS.values():
        assert set(words.split()) <= names and seconds > 0
    for name in names:
        assert (FILE.parent / "device_parts" / f"{name}.py").is_file()


def test_the_parent_needs_no_torch():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(FILE)], capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


class FakeSession:
    """A session that keeps its rows, with one kernel in the table of ours."""

    device = torch.device("cpu")

    def __init__(self, **kernels) -> None:
        self.rows, self.triton = [], replace(EAGER, **kernels)

    def emit(self, **row) -> None:
        self.rows.append(row)


def swiglu_that(change):
    """Return a swiglu whose result is changed: change(y, number of the call)."""
    calls = []

    def swiglu(x):
        calls.append(x)
        return change(EAGER.swiglu(x), len(calls))

    return swiglu


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda y, n: y, "right"),
        (lambda y, n: y * 1.001, "WRONG forward and backward"),
        (lambda y, n: y + 0.001, "WRONG forward"),
        (lambda y, n: y * torch.nan, "WRONG forward and backward"),
        (lambda y, n: y * (1 + 1e-6 * (n == 2)), "WRONG: a second call gives other results"),
        (lambda y, n: y[:, :1] @ y, "WRONG: RuntimeError"),
    ],
)
def test_correctness_finds_a_wrong_kernel(change, verdict):
    session = FakeSession(swiglu=swiglu_that(change))
    (case,) = (case for case in cases.small_cases() if case.op == "swiglu")
    correctness.solve(session, case, {"op": "swiglu"})
    (row,) = session.rows
    assert row["op"] == "swiglu" and row["verdict"].startswith(verdict)
    assert verdict != "right" or row["verdict"] == "right"


def test_the_cases_are_of_every_operation():
    for found in (cases.small_cases(), cases.all_cases()):
        assert {case.op for case in found} == set(OPERATIONS)


LEAST = {"B": 2, "T": 40, "S": 50, "N": 20, "C": 32, "V": 301, "F": 40, "M": 24, "L": 1, "H": 4}


@pytest.mark.slow
def test_every_case_for_a_gpu_can_be_computed():
    """Solve them with eager code in place of ours, at smaller sizes."""
    session = FakeSession()
    for case in cases.all_cases():
        sizes = {name: min(n, LEAST.get(name, n)) for name, n in case.sizes.items()}
        small = replace(case, sizes={**sizes, **({"G": 2} if sizes.get("G", 0) > 2 else {})})
        correctness.solve(session, small, {"case": f"{small} {small.words}"})
    assert [row for row in session.rows if row["verdict"] != "right"] == []


def test_the_lines_of_pytest_become_rows(capsys):
    session = FakeSession()
    lines = [
        "[gw0] [ 12%] PASSED tests/kernels/test_x.py::test_a[64 b-c] \n",
        "[gw1] [ 13%] FAILED tests/kernels/test_x.py::test_b \n",
        "tests/kernels/test_y.py::test_c[a] PASSED   [ 14%]\n",
        "tests/kernels/test_y.py::test_d ERROR   [ 15%]\n",
        "FAILED tests/kernels/test_x.py::test_b - AssertionError: x\n",
        "=== 1 failed, 2 passed, 1 error ===\n",
    ]
    counts, summary = tests_part.follow(lines, session)
    assert counts == {"passed": 2, "failed": 1, "error": 1}
    assert summary == "=== 1 failed, 2 passed, 1 error ==="
    assert session.rows == [
        {"verdict": "WRONG: failed", "test": "tests/kernels/test_x.py::test_b"},
        {"verdict": "WRONG: error", "test": "tests/kernels/test_y.py::test_d"},
    ]
    assert capsys.readouterr().out == "".join(lines)


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(gpu, tmp_path):
    words = ["--dry", "--parts", "all", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, str(FILE), *words])
    parts = json.loads((tmp_path / "results.json").read_text())
    report = (tmp_path / "report.txt").read_text()
    assert done.returncode == 0 and report.startswith("No faults."), report
    assert list(parts) == [part.name for part in gpu.PARTS]
    assert {name for name, part in parts.items() if part["state"] != "done"} == set(), report
    assert all(part["rows"] for part in parts.values()), report
    checked = parts["correctness"]["rows"]
    assert {row["op"] for row in checked} == set(OPERATIONS)
    assert {row["verdict"] for row in checked} == {"right"}
    noted = [row for part in ("step", "decode", "sweep") for row in parts[part]["rows"]]
    assert all("Error" not in row["note"] for row in noted), report
