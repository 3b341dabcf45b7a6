"""`minillm profile`: the command from end to end on a CPU, and what it measures with."""

import contextlib
import csv
import json
import math
import os
import subprocess
import sys
import types
from itertools import count
from pathlib import Path

import pytest
import torch

from minillm.commands import profile
from minillm.flags import profile as flags
from minillm.model.size import flops_per_token
from minillm.ops import EAGER
from minillm.profiling.catalogue.entry import BACKWARD, BOTH, FORWARD
from minillm.profiling.catalogue.problem import CATALOGUE, Problem, problems_of, small_problem
from minillm.profiling.timing import (
    implementations,
    machine,
    operations,
    precision,
    roofline,
    steps,
    suites,
)
from minillm.runtime import ceilings, program, stopwatch
from tests.support.broad import broad

HOME = Path(machine.__file__).resolve().parents[3]  # where minillm is imported from
CPU = torch.device("cpu")
ROOFS = {"fp32_tflops": 1.0, "bf16_tflops": 2.0, "fp16_tflops": 2.0, "memory_gbps": 100.0}


def run(*flags: object) -> int:
    words = ["--device", "cpu", "--threads", "1", *map(str, flags)]
    return program.run("minillm profile", profile.main, words)


@pytest.fixture
def fixed_roofs(monkeypatch):
    """Ceilings that need not be measured."""
    monkeypatch.setattr(ceilings, "ceilings", lambda device, dtypes, quick: dict(ROOFS))


@pytest.fixture
def no_interpreter(monkeypatch):
    """Our kernels are not interpreted, which starts a process."""
    monkeypatch.setattr(operations.interpreted, "errors", lambda problems: [
        {"errors": {}, "note": "no interpreter"} for _ in problems
    ])  # fmt: skip


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_the_kernels_suite(tmp_path, capsys, no_interpreter):
    flags = ("--quick", "--op", "rms_norm", "--op", "linear_cross_entropy", "--out", tmp_path)
    assert run("--suite", "kernels", *flags) == 0
    said = capsys.readouterr()
    assert "rms_norm" in said.out and "no GPU in use" in said.err.splitlines()[0]
    results = read(tmp_path)
    rows = results["suites"]["kernels"]
    assert {row["op"] for row in rows} == {"rms_norm", "linear_cross_entropy"}
    assert set(results["about"]["ceilings"]) == {"fp32_tflops", "memory_gbps", "cached_gbps"}
    for key in ("device", "torch", "python", "date", "command"):
        assert results["about"][key]
    for row in rows:
        assert (row["median_us"] is None) == (row["tflops"] is None)
        if row["implementation"] in ("eager", "vendor"):
            assert row["median_us"] > 0 and row["spread_us"] >= 0 and row["note"] == ""
            assert row["gbps"] > 0 and row["percent_of_ceiling"] > 0
            assert 0 < row["error"] < 1e-5, row
        else:
            assert row["median_us"] is None and row["note"]
    ways = {(row["op"], row["direction"]) for row in rows}
    assert ways == {
        ("rms_norm", FORWARD), ("rms_norm", BACKWARD), ("linear_cross_entropy", FORWARD),
        ("linear_cross_entropy", BOTH),
    }  # fmt: skip
    with (tmp_path / "kernels.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    for line, row in zip(table, rows, strict=True):
        for key, value in row.items():
            if isinstance(value, float):
                assert float(line[key]) == value
            else:
                assert line[key] == ("" if value is None else str(value))


@broad("ops", [("rms_norm", "swiglu"), tuple(CATALOGUE)], ids=["two", "all"])
def test_the_triton_kernels_errors_come_from_the_interpreter(tmp_path, fixed_roofs, ops):
    flags = ("--quick", "--out", tmp_path, "--dtype", "bf16")
    assert run("--suite", "kernels", *(w for op in ops for w in ("--op", op)), *flags) == 0
    ours = [r for r in read(tmp_path)["suites"]["kernels"] if r["implementation"] == "triton"]
    assert {row["op"] for row in ours} == set(ops)
    for row in ours:
        small = small_problem(row["op"], row["dtype"]).shape
        assert row["median_us"] is None and f"interpreter, at {small}, its" in row["note"], row
        assert row["error"] is None and 0 <= row["interpreted_error"] < 0.06, row


def test_the_model_suite(tmp_path, fixed_roofs):
    assert run("--suite", "model", "--quick", "--out", tmp_path) == 0
    rows = {row["implementation"]: row for row in read(tmp_path)["suites"]["model"]}
    assert list(rows) == ["eager", "compile", "triton", "triton_compile"]
    row = rows["eager"]
    chosen = steps.size("cpu", quick=True)
    tokens = chosen.batch * chosen.model.seq_len
    assert row["tokens_per_s"] == pytest.approx(1e3 * tokens / row["step_ms"])
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * flops_per_token(chosen.model) / 1e12)
    assert 0 < row["loss"] < math.log(1024)  # it has learnt its one batch a little
    assert rows["compile"]["note"] == "not with --quick" and rows["triton"]["step_ms"] is None


def test_the_decode_suite(tmp_path):
    assert run("--suite", "decode", "--quick", "--out", tmp_path) == 0
    rows = read(tmp_path)["suites"]["decode"]
    assert [row["implementation"] for row in rows] == ["eager", "triton", "compile"]
    assert rows[0]["tokens_per_s"] > 0 and rows[0]["batch"] == 1 and rows[0]["context"] == 64
    assert all(row["note"] and row["tokens_per_s"] is None for row in rows[1:])


def test_the_roofline_suite(tmp_path, fixed_roofs, no_interpreter):
    assert run("--suite", "roofline", "--quick", "--op", "swiglu", "--out", tmp_path) == 0
    results = read(tmp_path)
    rows = results["suites"]["roofline"]
    assert [row["implementation"] for row in rows] == ["eager", "eager"]
    for row in rows:
        roof = min(1.0, row["intensity"] * 0.1)
        assert row["attainable_tflops"] == pytest.approx(roof)
        assert row["percent"] == pytest.approx(100 * row["tflops"] / roof)
    assert rows[0]["intensity"] == pytest.approx(5 / 12)
    assert "kernels" not in results["suites"]


AUDIT = """
import sys
from minillm.runtime import program
from minillm.commands import profile
from minillm.profiling.audit import audit, cases
if __name__ == "__main__":
    two = [cases.Case(90, "swiglu", "bf16", 2048), cases.Case(80, "adamw", "bf16", 0)]
    cases.subset = lambda: two
    well = program.run("minillm profile", profile.main, [*sys.argv[1:], "--op", "swiglu"])
    audit.faults = lambda row: ["planted"]
    sys.argv[sys.argv.index("--out") + 1] += "-faulty"
    print(well, program.run("minillm profile", profile.main, [*sys.argv[1:], "--op", "adamw"]))
"""


@pytest.mark.slow
def test_the_audit_suite_needs_no_gpu_and_tells_faults_by_its_exit_code(tmp_path):
    script = tmp_path / "audited.py"
    script.write_text(AUDIT, encoding="utf-8")
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}  # Triton compiles there
    words = [sys.executable, script, "--suite", "audit", "--out", tmp_path / "out"]
    done = subprocess.run(
        [*map(str, words), "--device", "cpu", "--threads", "1"], capture_output=True, text=True,
        env={**env, "PYTHONPATH": str(HOME)}, timeout=600,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 1", done.stderr
    assert "fault: _adamw_kernel" in done.stderr and "bug" not in done.stderr
    for folder, op in (("out", "swiglu"), ("out-faulty", "adamw")):
        rows = read(tmp_path / folder)["suites"]["audit"]
        assert {row["op"] for row in rows} == {op} and all(row["registers"] for row in rows)


def test_the_audit_refuses_under_the_interpreter(tmp_path, capsys):
    if not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("Triton compiles here")
    assert run("--suite", "audit", "--out", tmp_path / "out") == 4
    assert "TRITON_INTERPRET" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_trace_is_json_with_events(tmp_path, capsys):
    path = tmp_path / "new" / "trace.json"
    assert run("--trace", path, "--quick") == 0
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"step 0", "step 2", "aten::linear"} <= names
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--suite", "speed"], 2, "is not one of"),
        (["--op", "softmax"], 2, "'softmax' is not one of attention"),
        (["--dtype", "fp8"], 2, "is not one of"),
        (["--full"], 2, "--suite audit"),
        (["--suite", "model", "--op", "rope"], 2, "--op: only kernels, audit, roofline"),
        (
            ["--suite", "decode", "--op", "rope"],
            2,
            "--op: only kernels, audit, roofline",
        ),
        (["--trace", "t", "--op", "rope"], 2, "--op: only kernels, audit, roofline"),
        (["--quik"], 2, "did you mean --quick"),
        (["--out", __file__], 2, "is not a folder"),
        (["--out", Path(__file__, "sub")], 2, "is not a folder"),
        (["--trace", HOME], 2, "is a folder; name a file"),
        (["--trace", Path(__file__, "x.json")], 2, "is not a folder"),
        (["--suite", "audit", "--dtype", "fp16"], 2, "--dtype: the audit and --tune take every"),
        (["--tune"], 4, "--tune: tiles are measured on a GPU"),
        (["--tune", "softmax"], 2, "--tune 'softmax' is not one of adamw"),
    ],
)
def test_wrong_input_is_one_line(flags, code, message, capsys):
    assert run(*flags) == code
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_mps_has_no_kernels_to_compare(capsys):
    for name in ("mps", "mps:0"):
        assert program.run("minillm profile", profile.main, ["--device", name]) == 2
        said = capsys.readouterr().err
        assert f"--device {name}: no kernels" in said and len(said.splitlines()) == 1


def test_a_folder_of_others_is_refused_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{")
    assert run("--quick", "--op", "rms_norm", "--out", tmp_path) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(
        f"--out {tmp_path}: holds other things than a profile; name another folder"
    )
    assert (tmp_path / "results.json").read_text() == "{"


def test_without_triton_the_rest_is_measured(tmp_path):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from minillm.commands import profile; from minillm.runtime import program\n"
        "sys.exit(program.run('minillm profile', profile.main, sys.argv[1:]))"
    )
    words = ("--suite", "decode", "--quick", "--device", "cpu", "--threads", "1", "--out", tmp_path)
    env = {**os.environ, "PYTHONPATH": str(HOME)}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, env=env,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read(tmp_path)["suites"]["decode"][0]["tokens_per_s"] > 0


def fake_clock(*durations: float):
    """Return a clock that is read before and after each run, and sometimes between."""
    times, step = [0.0], count()

    def now() -> float:
        return times[0]

    def work(_) -> None:
        times[0] += durations[next(step) % len(durations)]

    return now, work


def test_the_median_is_of_all_runs_and_the_first_is_not_timed():
    now, work = fake_clock(100.0, 1.0, 2.0, 3.0, 4.0, 90.0)  # the first warms up
    found = stopwatch.on_cpu([stopwatch.Trial(work)], seconds=0.0, now=now)
    assert found == [stopwatch.Timing(3e6, pytest.approx(found[0].spread_us), 5)]
    middle, spread = stopwatch.middle([1.0, 2.0, 3.0, 4.0, 5.0])
    assert middle == 3 and spread == pytest.approx(3.6)
    assert stopwatch.summary([2.0]) == stopwatch.Timing(2e6, 0.0, 1)


def test_trials_take_turns_and_preparing_is_not_timed():
    order, clock = [], [0.0]

    def tick(name: str, seconds: float):
        def work(given) -> None:
            order.append((name, given))
            clock[0] += seconds

        return work

    def prepare() -> str:
        clock[0] += 50
        return "given"

    trials = [stopwatch.Trial(tick("a", 1.0), prepare), stopwatch.Trial(tick("b", 2.0))]
    a, b = stopwatch.on_cpu(trials, seconds=0.0, now=lambda: clock[0])
    assert (a.median_us, b.median_us, a.runs) == (1e6, 2e6, stopwatch.LEAST)
    assert order[2:] == [("a", "given"), ("b", None)] * stopwatch.LEAST


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda as timing sees it: a clock of milliseconds that kernels move, and a log."""
    log: list[str] = []
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, other: "Event") -> float:
            return other.at - self.at

    fakes = {
        "device": lambda device: contextlib.nullcontext(),
        "get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=64),
        "synchronize": lambda device: None,
        "_sleep": lambda cycles: log.append("hold"),
        "Event": Event,
        "memory_allocated": lambda device: 1000,
        "max_memory_allocated": lambda device: 5000,
        "reset_peak_memory_stats": lambda device: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def kernel(name: str, ms: float):
        def work(_=None) -> None:
            log.append(name)
            clock[0] += ms

        return work

    return kernel, log


def test_on_a_gpu_events_are_around_the_run_alone(gpu):
    kernel, log = gpu
    trial = stopwatch.Trial(kernel("backward", 3.0), kernel("forward", 50.0))
    found = stopwatch.on_gpu(trial, seconds=0.0, device=CPU)
    assert (found.median_us, found.spread_us, found.runs) == (3000.0, 0.0, stopwatch.LEAST)
    assert log[-3:] == ["forward", "hold", "backward"] and log.count("hold") == stopwatch.LEAST


def test_on_a_gpu_each_trial_is_by_itself_and_its_memory_is_told(gpu, monkeypatch):
    kernel, _ = gpu
    monkeypatch.setattr(operations, "on_gpu", lambda t, s, d: stopwatch.on_gpu(t, s, CPU))

    def fails(_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    trials = {"eager": stopwatch.Trial(fails), "triton": stopwatch.Trial(kernel("k", 1.0))}
    found = operations._timed(trials, torch.device("cuda"), 0.0)
    assert found["eager"] == (None, None, "OutOfMemoryError: CUDA out of memory. Tried to allocate")
    assert found["triton"][0].median_us == 1000.0 and found["triton"][1:] == (4000, "")


def test_errors_are_relative_to_the_truth_in_fp64():
    problem = Problem("swiglu", {"N": 8, "F": 16}, "fp32")
    data = problem.data(CPU)
    true = precision.truth(problem, data)
    exact = precision.errors(EAGER.swiglu, data, true)
    assert exact[FORWARD] < 1e-6 and exact[BACKWARD] < 1e-6
    off = precision.errors(lambda x: EAGER.swiglu(x) * 1.01, data, true)
    assert off[FORWARD] == pytest.approx(0.01, rel=1e-3)
    assert off[BACKWARD] == pytest.approx(0.01, rel=1e-3)
    lost = precision.errors(lambda x: EAGER.swiglu(x) * torch.nan, data, true)
    assert math.isnan(lost[FORWARD])


def test_attention_is_judged_by_a_part_that_does_not_depend_on_the_rest():
    problem = Problem("attention", {"B": 2, "T": 24, "H": 2, "D": 16}, "fp32")
    data = problem.data(CPU)
    true = precision.truth(problem, data)
    assert true[FORWARD][0].shape == (1, 24, 1, 16)
    found = precision.errors(EAGER.attention, data, true)
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize("op", CATALOGUE)
def test_every_operation_has_data_costs_and_directions(op):
    problem = small_problem(op, "fp32")
    data = problem.data(CPU)
    assert bool(data.leaves) == (len(problem.directions) > 1) == bool(data.dy)
    for direction in problem.directions:
        flops, moved = problem.cost(direction)
        assert flops > 0 and moved > 0
    again = problem.data(CPU)
    assert all(torch.equal(x, again.leaves[name]) for name, x in data.leaves.items())
    for kind in ("cuda", "cpu"):
        assert problems_of((op,), kind, "bf16") and problems_of((op,), kind, "bf16", True)


def test_the_gpus_attention_cells_are_those_of_the_bars():
    cells = [p.sizes for p in problems_of(("attention",), "cuda", "bf16")]
    assert {(s["D"], s["T"]) for s in cells} == {
        (D, 1024 * n) for D in (64, 128) for n in (1, 2, 4, 8, 16)
    }
    assert all(s["B"] * s["T"] == 16384 and s["H"] * s["D"] == 2048 for s in cells)
    flops, moved = Problem("attention", cells[0], "bf16").cost(FORWARD)
    assert flops == 4 * 16 * 32 * 1024**2 * 64 / 2 and moved == 4 * 16384 * 2048 * 2
    assert Problem("attention", cells[0], "bf16").cost(BACKWARD)[0] == 2.5 * flops


def test_what_fails_is_a_row_with_a_note(monkeypatch, no_interpreter):
    def broken(**_):
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: no compiler\n")

    monkeypatch.setitem(implementations.VENDOR, "rms_norm", broken)
    problem = Problem("rms_norm", {"N": 4, "C": 16}, "fp32")
    effort = operations.Effort(0.0, False)
    rows = operations.run([problem], CPU, ROOFS, effort, lambda line: None)
    notes = {row["implementation"]: row["note"] for row in rows}
    assert (
        notes["eager"] == "" and notes["vendor"] == "RuntimeError: InvalidCxxCompiler: no compiler"
    )
    assert notes["triton"] == "no interpreter"
    assert [r["op"] for r in roofline.rows(rows, ROOFS)] == ["rms_norm"] * 2  # eager, both ways


def test_compiled_code_is_tried(monkeypatch):
    tried = []

    def compiler(function, **options):
        tried.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    problem = Problem("swiglu", {"N": 4, "F": 16}, "fp32")
    found = implementations.implementations(problem, CPU, True, "needs a GPU")
    assert tried == [{"dynamic": False}] and found["compile"] is EAGER.swiglu
    assert found["triton"] == "needs a GPU"


def test_the_measured_ceilings_are_of_this_machine():
    found = ceilings.ceilings(CPU, ["fp32"], quick=True)
    assert 1e-4 < found["fp32_tflops"] < 100 and 0.1 < found["memory_gbps"] < 10000
    assert list(found["cached_gbps"]) == [str(n) for n in ceilings.WORKING_SETS]
    assert all(0.01 < gbps < 100000 for gbps in found["cached_gbps"].values())
    assert machine.folder_name(CPU).rsplit("-", 3)[0] == machine.folder_name(CPU)[:-11]


def test_a_large_product_that_is_interrupted_does_not_lower_the_ceiling_of_a_cpu(monkeypatch):
    """On a shared CPU no long product runs uninterrupted, but short operations do."""
    speeds = {512: 0.017, 256: 0.09, 128: 0.08}
    monkeypatch.setattr(ceilings, "_product_tflops", lambda n, *_: speeds[n])
    monkeypatch.setattr(ceilings, "_streaming_gbps", lambda *_: 10.0)
    assert ceilings.ceilings(CPU, ["fp32"], quick=True)["fp32_tflops"] == 0.09


def test_a_fault_of_the_audit_outlives_the_suites_behind_it(tmp_path, capsys, monkeypatch):
    bad = {"kernel": "_k", "op": "rope", "config": "c", "arch": "sm_90", "error": "no"}

    def measure(job, name, full):
        return ([bad], ["planted"]) if name == "audit" else ([{"implementation": "eager"}], [])

    monkeypatch.setattr(suites, "measure", measure)
    assert run("--suite", "all", "--op", "rope", "--out", tmp_path) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "fault: planted" and (tmp_path / "audit.md").is_file()
    wrote = [line for line in said if line.startswith("wrote ")]
    assert f"wrote {tmp_path / 'audit.md'}" in wrote and len(wrote) == len(set(wrote)) == 8
    starts = [said.index(f"== {name}") for name in flags.SUITES]
    assert starts == sorted(starts)
    for name, at in zip(flags.SUITES, starts, strict=True):
        assert said[at + 1] == f"{name}: 0 s"


def test_audit_md_has_the_rows_that_stayed_too(tmp_path, capsys, monkeypatch):
    bad = {"kernel": "_k", "config": "c", "arch": "sm_90", "error": "no"}
    monkeypatch.setattr(suites, "measure", lambda job, *_: ([{**bad, "op": job.ops[0]}], []))
    monkeypatch.setattr(
        suites, "write_audit", lambda folder, rows: folder / "-".join(r["op"] for r in rows)
    )
    assert run("--suite", "audit", "--op", "rope", "--out", tmp_path) == 0
    assert run("--suite", "audit", "--op", "adamw", "--out", tmp_path) == 0
    assert f"wrote {tmp_path / 'rope-adamw'}" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("suite", ["kernels", "roofline"])
def test_what_was_measured_before_an_interrupt_is_kept(tmp_path, monkeypatch, fixed_roofs, suite):
    solve = operations._solve

    def interrupted(problem, *args):
        if problem.op == "swiglu":
            raise KeyboardInterrupt
        return [row for row in solve(problem, *args) if row["implementation"] == "eager"]

    monkeypatch.setattr(operations, "_solve", interrupted)
    flags = ("--op", "rope", "--op", "swiglu", "--quick", "--out", tmp_path)
    assert run("--suite", suite, *flags) == 130
    found = read(tmp_path)["suites"]
    assert list(found) == [suite] and [row["op"] for row in found[suite]] == ["rope"] * 2
    assert (tmp_path / f"{suite}.csv").is_file() and (tmp_path / "index.html").is_file()


def test_a_device_that_failed_ends_nothing_more(monkeypatch):
    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    operations.release(torch.device("cuda"))


@pytest.mark.parametrize("factor", [math.nan, math.inf, 2.0])
def test_wrong_numbers_are_not_timed(monkeypatch, no_interpreter, factor):
    """Those of the gradients alone here: the other direction is as good as it was."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, targets):
            with torch.enable_grad():
                ctx.leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
                ctx.y = implementations._cross_entropy(*ctx.leaves, targets)
            return ctx.y.detach()

        @staticmethod
        def backward(ctx, dy):
            return *(factor * g for g in torch.autograd.grad(ctx.y, ctx.leaves, dy)), None

    name = "linear_cross_entropy"
    monkeypatch.setitem(implementations.VENDOR, name, lambda x, w, targets: Broken.apply(
        x, w, targets
    ))  # fmt: skip
    problem = Problem(name, {"N": 8, "C": 16, "V": 24}, "fp32")
    effort = operations.Effort(0.0, False)
    rows = operations.run([problem], CPU, ROOFS, effort, lambda line: None)
    found = {row["direction"]: row for row in rows if row["implementation"] == "vendor"}
    right, bad = found[FORWARD], found[BOTH]
    assert right["median_us"] > 0 and right["note"] == "" and right["error"] < 1e-6
    assert bad["note"] == "wrong numbers" and not bad["error"] <= 0.5
    assert bad["median_us"] is None and bad["tflops"] is None
    assert len(roofline.rows(rows, ROOFS)) == 3


def test_an_error_not_known_is_not_wrong():
    assert not operations.wrong(None) and not operations.wrong(0.06)
    assert operations.wrong(math.nan) and operations.wrong(math.inf) and operations.wrong(0.6)


def test_ceilings_are_measured_once_a_run(monkeypatch):
    calls = []
    monkeypatch.setattr(ceilings, "ceilings", lambda *_: calls.append(1) or dict(ROOFS))
    job = suites.Job(CPU, ("swiglu",), "fp32", True, {"device": "x"}, lambda line: None)
    assert job.roofs is job.roofs and calls == [1] and job.about["ceilings"] == ROOFS
