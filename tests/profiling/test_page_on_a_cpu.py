"""Page of a machine without a GPU: nothing empty, no dot above its roof, every call named."""

import re
from html.parser import HTMLParser

import pytest
import torch

from minillm.profiling.catalogue.problem import problems_of
from minillm.profiling.page import page, report
from minillm.profiling.timing import operations, roofline
from minillm.runtime import ceilings

ABOUT = {
    "device": "Some CPU", "driver": None, "torch": "2.0", "triton": None, "python": "3.11",
    "commit": None, "threads": 1, "date": "2026-01-02 10:00 UTC",
    "command": "python -m minillm profile --suite all",
    "ceilings": {"fp32_tflops": 0.1, "memory_gbps": 10.0,
                 "cached_gbps": {"65536": 60.0, "1048576": 80.0, "16777216": 40.0}},
}  # fmt: skip
NEEDS = "needs a GPU to be timed"


def kernel(op, name, us=None, **more):
    """Return a row of the suite kernels of a CPU, where one implementation of five has a time."""
    row = {"suite": "kernels", "op": op, "shape": "N512 C256", "dtype": "fp32",
           "direction": "forward", "implementation": name, "median_us": us, "spread_us": us,
           "tflops": None, "gbps": None, "percent_of_ceiling": None, "ceiling": "memory",
           "peak_bytes": None, "error": None, "interpreted_error": None,
           "note": "" if us else NEEDS}  # fmt: skip
    if us:
        row |= {"tflops": 0.01, "gbps": 20.0, "percent_of_ceiling": 25.0, "error": 1e-7}
    return row | more


def suites():
    names = ("compile", "cudnn", "efficient", "triton")
    return {
        "kernels": [kernel(op, "eager", 52.0) for op in ("rms_norm", "attention")]
        + [kernel(op, name) for op in ("rms_norm", "attention", "rope") for name in names],
        "model": [{"implementation": "eager", "step_ms": 48.0, "spread_ms": 2.0, "mfu": 0.4,
                   "tokens_per_s": 2660.0, "peak_bytes": None, "loss": 5.0, "note": ""}]
        + [{"implementation": name, "note": NEEDS} for name in names],
        "decode": [{"implementation": name, "batch": 1, "context": 64, "note": NEEDS,
                    "tokens_per_s": 160.0 if name == "eager" else None}
                   for name in ("eager", *names)],
        "roofline": roofline.rows([kernel("rms_norm", "eager", 52.0)], ABOUT["ceilings"]),
    }  # fmt: skip


class Tables(HTMLParser):
    """Parser of a page: its tables, as lists of words by row, and its headings in order."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.headings, self.tag = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tag = tag
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self.tag = ""

    def handle_data(self, data):
        if self.tag in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if self.tag in ("h2", "h3"):
            self.headings.append(data)


def test_no_table_column_or_line_of_the_page_is_empty():
    tables = Tables(page.render(ABOUT, suites())).tables
    assert tables
    for header, *body in tables:
        assert body, header
        for title, *column in zip(header, *body, strict=True):
            assert set(column) - {"–", "-", ""}, f"{title} of {header}"
        for line in body:
            assert any(re.search(r"\d", word) for word in line), line


def test_the_first_table_says_how_fast_what_was_timed_is():
    header, *body = Tables(page.render(ABOUT, suites())).tables[0]
    assert header == ["op", "cases", "fastest in", "best % of ceiling"]
    assert body[0] == ["rms_norm", "1", "eager 1", "25"]


def test_facts_not_known_are_left_out_of_the_page():
    html = page.render(ABOUT, suites())
    assert "<dd>–</dd>" not in html and "driver" not in html


def test_what_was_not_measured_comes_last_in_the_page():
    unmeasured = {**suites(), "kernels": [kernel("rope", "triton")]}
    headings = Tables(page.render(ABOUT, unmeasured)).headings
    assert headings.index("Kernels") > max(map(headings.index, ("Model", "Decode", "Roofline")))
    assert "not measured" in page.render(ABOUT, unmeasured)  # the remarks say why


@pytest.mark.parametrize("suite", ["kernels", "model", "decode", "roofline"])
def test_no_column_or_line_of_the_terminals_tables_is_empty(suite):
    rows = suites()[suite]
    told = report.table(suite, rows)
    lines = [line for line in told.splitlines() if not line.startswith("  ") or suite == "decode"]
    remarks = [line for line in told.splitlines() if NEEDS in line]
    shown = [line for line in lines if line not in remarks]
    assert not any(re.search(r"(^|  )-(  |$)", line) for line in shown), told
    assert all(len(line) <= 80 for line in shown if suite != "roofline"), told
    assert bool(remarks) == (suite != "roofline")
    nothing = [{**row, "median_us": None, "step_ms": None, "tokens_per_s": None, "tflops": None}
               for row in rows]  # fmt: skip
    assert "nothing was measured" in report.table(suite, nothing)


# Roofs


def test_the_roof_is_that_of_the_level_in_which_the_data_lie():
    """Roofs fall as data grow; beyond the caches the roof is that of the memory."""
    roofs = ABOUT["ceilings"]
    by_hand = [(100, 80), (65536, 80), (1 << 20, 80), ((16 << 20) - 1, 80), (16 << 20, 40),
               (64 << 20, 40), (65 << 20, 10), (1 << 30, 10)]  # fmt: skip
    for n_bytes, gbps in by_hand:
        assert roofline.bandwidth(roofs, n_bytes)[0] == gbps, n_bytes
    assert roofline.bandwidth({"memory_gbps": 7.0}, 100) == (7.0, "memory")


def test_data_in_a_cache_are_not_over_the_roof_of_the_memory():
    """24.7 GB/s on 1 MB of data: 247 % of a memory of 10 GB/s, 31 % of its cache's 80."""
    row = kernel("rms_norm", "eager", 1e-3 * (1 << 20) / 24.7, gbps=24.7, tflops=24.7 * 0.25 / 1e3)
    (found,) = roofline.rows([row], ABOUT["ceilings"])
    assert found["percent"] == pytest.approx(100 * 24.7 / 80)
    assert found["roof"] == "data of 1.00 MiB"


@pytest.mark.slow
def test_nothing_measured_here_is_over_its_roof():
    device = torch.device("cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        roofs = ceilings.ceilings(device, ("fp32",), quick=True)
        ops = ("rms_norm", "add_rms_norm", "swiglu", "rope", "adamw", "decode_attention")
        problems = problems_of(ops, "cpu", "fp32", quick=True)
        effort = operations.Effort(0.02, False)
        rows = [row for problem in problems for row in operations._solve(
            problem, device, roofs, effort, operations.triton_table(device)
        )]  # fmt: skip
    finally:
        torch.set_num_threads(before)
    found = roofline.rows(rows, roofs)
    assert len(found) > 8
    # A busy neighbour may slow down the roofs alone.
    assert all(row["percent"] < 150 for row in found), [(r["op"], r["percent"]) for r in found]


# Calls


def test_each_call_stands_on_the_page_with_its_command_and_ceilings(tmp_path):
    kernels = {"kernels": suites()["kernels"]}
    report.write(tmp_path, ABOUT, kernels)
    slower = {**ABOUT["ceilings"], "memory_gbps": 5.5}
    later = {**ABOUT, "date": "2026-02-03", "command": "profile --suite roofline",
             "ceilings": slower}  # fmt: skip
    report.write(tmp_path, later, {"roofline": suites()["roofline"]})
    again = {**later, "command": "profile --op rope", "date": "2026-03-04"}
    report.write(tmp_path, again, {"kernels": [kernel("rope", "eager", 9.0)]})
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    for about in (ABOUT, later, again):
        assert about["command"] in html and about["date"] in html
    assert "memory 10.0 GB/s, data of 64.0 KiB 60.0 GB/s" in html and "memory 5.50 GB/s" in html
    assert "kernels: rms_norm, attention" in html and "kernels: rope" in html
    assert html.count('data-roof="memory"') == 1


def test_dots_of_two_calls_are_drawn_under_their_own_roofs(tmp_path):
    for op, gbps in (("rms_norm", 10.0), ("rope", 20.0)):
        about = {**ABOUT, "date": op, "ceilings": {"fp32_tflops": 0.1, "memory_gbps": gbps}}
        rows = roofline.rows([kernel(op, "eager", 52.0)], about["ceilings"])
        report.write(tmp_path, about, {"roofline": rows})
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert html.count('data-roof="memory"') == 2
    assert "memory, 10.0 GB/s" in html and "memory, 20.0 GB/s" in html
