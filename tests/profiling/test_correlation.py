"""Rank correlation of bounds and speeds: by hand, and for code that was really launched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.profiling.page import correlation, page, report

HOME = Path(correlation.__file__).resolve().parents[3]


@pytest.mark.parametrize(
    "bounds, speeds, rho",
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 (1 + 1 + 1 + 1) / (5 (25 - 1))
        ([1, 10, 100, 1000], [1, 2, 3, 3.5], 1.0),  # of places, not of values
        ([7, 7, 7, 8, 9], [1, 2, 3, 4, 5], 8 / 80**0.5),  # places 1 1 1 3 4
        ([5, 5, 5, 5], [1, 2, 3, 4], None),
        ([1, 2, 3], [1, 2, 3], None),  # three are no order
    ],
)
def test_spearman(bounds, speeds, rho):
    found = correlation.spearman(list(zip(bounds, speeds, strict=True)))
    assert found == (None if rho is None else pytest.approx(rho))


def tiles(op, bounds, times, **more):
    """Rows of the suite `tune`."""
    where = {"op": op, "kernel": "fwd", "size": 64, "arch": "sm_90", "spread_us": 0.1, "note": ""}
    return [
        {**where, "options": f"BLOCK={n}", "median_us": us, "error": 1e-3, "kept": n == 0,
         "bound_tflops": bound, "bound_gbps": None, **more}
        for n, (bound, us) in enumerate(zip(bounds, times, strict=True))
    ]  # fmt: skip


ROWS = [
    *tiles("attention", [400, 300, 200, 100, 900], [1.0, 2.0, 3.0, 4.0, None]),
    *tiles("newton_schulz", [400, 300, 200, 100], [2.0, 1.0, 3.0, 4.0]),
    *tiles("rope", [None] * 4, [1.0, 2.0, 3.0, 4.0], bound_gbps=4800.0),
]


def test_entries_are_ranked_by_themselves_and_what_has_no_time_is_left_out():
    attention, newton, rope, mean = correlation.correlations(ROWS)
    assert attention == {"op": "attention", "kernel": "fwd", "size": "64", "tiles": 4, "rho": 1.0}
    assert newton["rho"] == pytest.approx(0.8) and rope["rho"] is None and rope["tiles"] == 4
    assert mean["op"] == "mean" and mean["tiles"] == 8 and mean["rho"] == pytest.approx(0.9)
    assert correlation.correlations(tiles("rope", [None] * 4, [1.0] * 4)) == []


def test_the_report_tells_them():
    told = report.table("tune", ROWS).splitlines()
    at = told.index("Rank correlation of static bound and measured speed")
    assert [line.split() for line in told[at + 1 : at + 4]] == [
        ["op", "kernel", "size", "tiles", "rho"],
        ["attention", "fwd", "64", "4", "1.00"],
        ["newton_schulz", "fwd", "64", "4", "0.800"],
    ]
    html = page.render({}, {"tune": ROWS})
    assert "Rank correlation of static bound" in html and "0.800" in html
    assert "Rank" not in report.table("tune", tiles("rope", [None] * 4, [1.0] * 4))


LAUNCHED = """
import json
from minillm.kernels import _launch
from minillm.profiling.audit import audit, cases
from minillm.profiling.page import correlation
from minillm.profiling.audit.dry import dry_gpu
case = cases.Case(90, "attention", "bf16", 64, ("mha",))
audited = {row["kernel"]: row["bound_tflops"] for row in audit.audit_case(case)}
with dry_gpu(90):
    with correlation.launches() as launched:
        case.run()
    case.run()  # no longer listed
tables = _launch._tables("attention")
found = {}
for kernel in ("fwd", "dkdv", "dq"):
    tile = tables[kernel]["sm_90"]["64"]
    found[kernel] = correlation.bound_of(launched, kernel, tile, 90)
absent = correlation.bound_of(launched, "fwd", {"BLOCK_T": 7}, 90)
delta = correlation.bound_of(launched, "delta", tables["delta"]["sm_90"]["64"], 90)
print(json.dumps([audited, found, absent, delta, len(launched)]))
"""


@pytest.mark.slow
def test_the_bound_is_of_the_kernel_that_took_the_tile(tmp_path):
    """Forward and dq have the same tile here, and bounds of their own."""
    pytest.importorskip("triton")
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}  # Triton compiles there
    env |= {"PYTHONPATH": str(HOME), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHED], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    audited, found, absent, delta, launched = json.loads(done.stdout)
    assert launched == 4 and absent == {} and delta["bound_gbps"] > 1000
    for kernel, name in (("fwd", "fwd"), ("dkdv", "dkdv_bwd"), ("dq", "dq_bwd")):
        assert found[kernel] == {"bound_tflops": audited[f"_attention_{name}_kernel"]}
    assert found["fwd"] != found["dq"]
