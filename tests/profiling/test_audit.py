"""Static audit: it finds the faults of bad kernels, and none in ours."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minillm.profiling.audit import cases
from minillm.profiling.audit.audit import audit, faults, markdown

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow  # compilers run: half a minute, and a minute or two for our kernels


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    """Return the rows of bad_kernels.py by kernel, compiled in a process of its own."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    script = Path(__file__).with_name("bad_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict]] = {}
    for row in json.loads(done.stdout.splitlines()[-1]):
        found.setdefault(row["kernel"], []).append(row)
    return found


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("_spilling_kernel", "registers spilled"),
        ("_atomic_kernel", "atomic instructions"),
        ("_narrow_kernel", "0 loads of 128 bits, 2 expected"),
        ("_plain_kernel", "a 16-bit product without tensor core"),
        ("_rounded_kernel", "an fp32 product rounded"),
        ("_wrong_kernel", "does not compile: CompileTimeAssertionFailure: at 2:4: a block of"),
        ("unknown", "does not compile: KeyError"),
        ("abort", "does not compile: the compiler ended its process"),
    ],
)
def test_a_bad_kernel_is_found_out(rows, kernel, words):
    (row,) = rows[kernel]
    assert any(words in fault for fault in faults(row)), faults(row)


def test_too_much_shared_memory_is_found_out(rows):
    """Five stages of 128 x 128 tiles are 320 KiB; three of 64 x 64 fit everywhere."""
    large = [row for row in rows["_large_kernel"] if row["op"] == "large"]
    small = [row for row in rows["_large_kernel"] if row["op"] == "product"]
    assert len(large) == 1 and "bytes of shared memory" in faults(large[0])[0]
    assert large[0]["occupancy"] == 0
    assert [row["arch"] for row in small] == ["sm_80", "sm_90", "sm_100"]
    assert [row["tensor_core"] for row in small] == ["HMMA", "HGMMA", "UTCHMMA"]
    assert all(row["wants_tensor_core"] and row["clocks_tensor"] > 0 for row in small)
    assert [faults(row) for row in small] == [[], [], []]
    # The tiles of sm_80 must fit into sm_86 and sm_89 too.
    found = [faults({**row, "shared_bytes": 100 * 1024}) for row in small]
    assert "102400 bytes of shared memory, 101376" in found[0][0] and found[1:] == [[], []]


def test_sound_kernels_have_no_faults_on_any_architecture(rows):
    for kernel in ("_sound_kernel", "_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel"):
        assert {row["arch"] for row in rows[kernel]} == {"sm_80", "sm_90", "sm_100"}
        assert not [faults(row) for row in rows[kernel] if faults(row)]
        assert all(row["loads_128"] and row["bound_gbps"] > 1000 for row in rows[kernel])


def test_serialised_wgmma_is_found_out(rows):
    """One source, 8 warps and 4; ptxas keeps the products of the second in flight."""
    bad, good = (
        row
        for op in ("serialised", "in flight")
        for row in rows["_serialised_kernel"]
        if row["op"] == op
    )
    assert faults(bad) == ["wgmma serialised"] and faults(good) == []
    assert bad["tensor_core"] == good["tensor_core"] == "HGMMA"


def test_a_dying_process_takes_no_other_case_along(rows):
    assert len([row for row in rows["_sound_kernel"] if row["arch"] == "sm_80"]) == 2


def test_the_table_has_a_line_a_row(rows):
    some = [*rows["_sound_kernel"], *rows["_wrong_kernel"]]
    lines = markdown(some).splitlines()
    assert len(lines) == 2 + len(some)
    assert all(line.count("|") == lines[0].count("|") for line in lines[:-1])
    assert "GB/s" in lines[2] and "static_assert" not in lines[2]


def test_the_interpreter_is_refused_in_this_process(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        audit([], workers=0)


def test_other_processes_compile_whatever_this_one_does(monkeypatch, tmp_path):
    """They have a cache of their own, too, and leave no trace in this process's settings."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    told = []
    (row,) = audit([cases.Case(90, "swiglu", "bf16", 512, ("evaluate",))], 1, told.append)
    assert row["kernel"] == "_swiglu_fwd_kernel" and faults(row) == []
    assert told == ["1/1 sm_90 swiglu bf16 512 evaluate"]
    assert os.environ["TRITON_INTERPRET"] == "1" and not list(tmp_path.iterdir())


def kernels_of_the_house() -> set[str]:
    """Return every function named _..._kernel in kernels/*.py that Triton compiles."""
    found = set()
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.endswith("_kernel"):
                continue
            if any("triton.jit" in ast.unparse(x) for x in node.decorator_list):
                found.add(node.name)
    return found


def test_every_shipped_kernel_is_sound():
    """A subset with every kernel, head width and architecture passes."""
    start = time.perf_counter()
    found = audit(cases.subset(), workers=2)
    print(f"{len(found)} kernels in {time.perf_counter() - start:.0f} s")
    bad = {f"{r['kernel']} {r['arch']} {r['config']}": faults(r) for r in found if faults(r)}
    assert not bad
    assert len(found) <= 120
    for arch in ("sm_80", "sm_90", "sm_100"):
        assert {r["kernel"] for r in found if r["arch"] == arch} == kernels_of_the_house()
        widths = {c.size for c in cases.subset() if c.op == "attention" and arch == f"sm_{c.arch}"}
        assert widths == {32, 64, 96, 128}
