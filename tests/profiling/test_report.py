"""Report of a profile, from invented rows: files that accumulate, a page that loads nothing."""

import csv
import json
import math
import re
from html.parser import HTMLParser

import pytest

from minillm.errors import UsageError
from minillm.profiling.page import page, pivot, plot, report

ABOUT = {
    "device": "Invented 9000",
    "driver": "1.2.3",
    "torch": "2.0",
    "triton": "3.0",
    "python": "3.11",
    "commit": "abc1234",
    "date": "2026-01-02",
    "command": "python -m minillm profile --suite all",
    "ceilings": {"bf16_tflops": 600.0, "fp32_tflops": 50.0, "memory_gbps": 4000.0},
}
HOSTILE = "<script>alert('x')</script>\"><img src=http://bad onerror=1>&amp;"
EAGER_US = {"rms_norm": 40.0, "attention": 900.0, "linear_cross_entropy": 30000.0}
SPEEDUPS = {"eager": 1.0, "compile": 2.0, "flash": 4.0, "cudnn": 5.0, "triton": 4.5}


def kernel(op, shape, dtype, direction, implementation, median_us, **more):
    row = {
        "suite": "kernels", "op": op, "shape": shape, "dtype": dtype, "direction": direction,
        "implementation": implementation, "median_us": median_us, "spread_us": 0.4,
        "tflops": 210.0, "gbps": 1500.0, "percent_of_ceiling": 35.0,
        "ceiling": "memory" if op == "rms_norm" else "compute", "peak_bytes": 3 << 20,
        "error": "", "note": "",
    }  # fmt: skip
    return {**row, **more}


def kernels():
    rows = []
    for op, eager in EAGER_US.items():
        names = [n for n in SPEEDUPS if op == "attention" or n not in ("flash", "cudnn")]
        for shape in ("4x1024x512", "8x2048x1024"):
            for dtype in ("bf16", "fp32"):
                for direction in ("forward", "backward"):
                    for name in names:
                        us = eager * (1 + len(direction) / 10) / SPEEDUPS[name]
                        rows.append(kernel(op, shape, dtype, direction, name, us))
    failed = {"tflops": None, "gbps": None, "percent_of_ceiling": None, "peak_bytes": None}
    rows.append(
        kernel("attention", "8x2048x1024", "fp32", "forward", "cudnn", None, **failed)
        | {"error": "RuntimeError: no engine for fp32"}
    )
    return rows


def rooflines():
    rows = []
    for dtype, peak in (("bf16", 600.0), ("fp32", 50.0)):
        for i, intensity in enumerate((0.5, 3.0, 40.0, 700.0)):
            attainable = min(peak, intensity * 4.0)
            for name in ("eager", "compile", "triton"):
                percent = {"eager": 20, "compile": 55, "triton": 90 - i}[name]
                rows.append({
                    "op": f"op{i}", "shape": "4x64", "dtype": dtype, "direction": "forward",
                    "implementation": name, "intensity": intensity,
                    "tflops": attainable * percent / 100, "attainable_tflops": attainable,
                    "percent": percent,
                })  # fmt: skip
    return rows


def suites():
    model = [
        {"implementation": name, "step_ms": ms, "spread_ms": 0.5, "tokens_per_s": 5e7 / ms,
         "mfu": 30 / ms, "peak_bytes": 5 << 30, "loss": 3.21, "note": ""}
        for name, ms in (("eager", 200.0), ("compile", 140.0), ("triton", 120.0))
    ]  # fmt: skip
    decode = [
        {"implementation": name, "batch": batch, "context": 2**n, "spread": 3.0, "note": "",
         "tokens_per_s": speed * batch**0.8 / (1 + 2**n / 8192)}
        for name, speed in (("eager", 90.0), ("triton", 210.0))
        for batch in (1, 8)
        for n in range(9, 15)
    ]  # fmt: skip
    audit = [
        {"kernel": f"_op{i}_fwd_kernel", "op": f"op{i}", "config": "bf16 64; M128 N64 w8 s3",
         "arch": f"sm_{arch}", "registers": 100 + i, "spill_bytes": 0, "shared_bytes": 49152,
         "tensor_core": "HGMMA", "occupancy": 0.25, "bound_tflops": 400.0, "bound_gbps": 2000.0,
         "limit": "tensor", "serialised": False, "error": ""}
        for arch in (80, 90)
        for i in range(4)
    ]  # fmt: skip
    audit.append(dict.fromkeys(audit[0]) | {"kernel": "_bad_kernel", "arch": "sm_90"})
    audit[-1]["error"] = "CompilationError: <unknown>"
    return {
        "kernels": kernels(), "model": model, "decode": decode, "roofline": rooflines(),
        "audit": audit,
    }  # fmt: skip


class Reader(HTMLParser):
    """Collects what a page has; an end tag that closes nothing, or the wrong thing, is an error."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), f"{tag} has an attribute twice"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag, **wanted):
        return [a for t, a in self.tags if t == tag and wanted.items() <= a.items()]


# Files


def test_results_survive_a_round_trip(tmp_path):
    folder = tmp_path / "new" / "folder"
    paths = report.write(folder, ABOUT, suites())
    names = {"results.json", "index.html", *(f"{suite}.csv" for suite in suites())}
    assert {path.name for path in paths} == names == {path.name for path in folder.iterdir()}
    assert json.loads((folder / "results.json").read_text()) == {
        "about": ABOUT, "suites": suites(),
    }  # fmt: skip


def test_what_json_does_not_know_is_made_plain(tmp_path):
    class Odd:
        def __str__(self):
            return "odd"

    rows = [{"a": math.nan, "b": -math.inf, "c": (1, 2), "d": Odd(), "e": True, "f": tmp_path}]
    report.write(tmp_path, {"device": Odd()}, {"kernels": rows})
    read = json.loads((tmp_path / "results.json").read_text())
    assert read["about"] == {"device": "odd"}
    plain = {"a": None, "b": None, "c": [1, 2], "d": "odd", "e": True, "f": str(tmp_path)}
    assert read["suites"]["kernels"] == [plain]


@pytest.mark.parametrize("suite", pivot.SUITES)
def test_a_csv_has_its_columns_in_order_and_nothing_for_none(tmp_path, suite):
    row = {"zebra": 1, "shape": [2, 3], "ant": None, "note": 'a "b", c\nd', "median_us": 0.1 + 0.2}
    report.write(tmp_path, ABOUT, {suite: [row, {}]})
    with (tmp_path / f"{suite}.csv").open(newline="") as file:
        header, first, second = csv.reader(file)
    known = report.COLUMNS[suite].split()
    assert header == known + sorted(set(row) - set(known))
    told = dict(zip(header, first, strict=True))
    assert told["ant"] == "" and told["zebra"] == "1" and told["shape"] == "2x3"
    assert told["note"] == row["note"] and float(told["median_us"]) == 0.1 + 0.2
    assert second == [""] * len(header)


def test_an_empty_suite_leaves_a_csv_of_its_header(tmp_path):
    report.write(tmp_path, ABOUT, {"model": [], "kernels": []})
    assert (tmp_path / "model.csv").read_text() == report.COLUMNS["model"].replace(" ", ",") + "\n"


@pytest.mark.parametrize("name", ["", "../up", "a/b", "Kernels", "a.b"])
def test_a_suite_that_names_no_file_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="suites: got the name"):
        report.write(tmp_path, ABOUT, {name: []})


def test_suites_accumulate_and_keep_their_origin(tmp_path):
    all_rows = suites()
    report.write(tmp_path, ABOUT, {"decode": all_rows["decode"], "model": all_rows["model"]})
    later = {**ABOUT, "device": "Another 1", "date": "2026-02-03"}
    report.write(tmp_path, later, {"kernels": all_rows["kernels"], "model": []})
    read = json.loads((tmp_path / "results.json").read_text())
    assert read["suites"]["model"] == all_rows["model"]
    newer = [{**all_rows["model"][0], "step_ms": 1.0}]
    last = {**later, "date": "2026-03-04"}
    report.write(tmp_path, last, {"model": newer})
    read = json.loads((tmp_path / "results.json").read_text())
    assert read["about"] == last
    assert list(read["suites"]) == ["kernels", "model", "decode"]
    assert read["suites"]["model"] == newer
    assert read["suites"]["decode"] == all_rows["decode"]
    assert read["earlier"] == {"kernels": later, "decode": ABOUT}
    html = (tmp_path / "index.html").read_text()
    # Only what differs in machine, version or commit is warned of, not a date.
    assert html.count("From another run") == 1
    assert "From another run (2026-01-02): device Invented 9000." in html
    assert (tmp_path / "decode.csv").read_text().count("\n") == len(all_rows["decode"]) + 1


def named(suite, *ops, n=1):
    return {suite: [{"op": op, "implementation": f"run {n}"} for op in ops]}


@pytest.mark.parametrize("suite", ["kernels", "roofline", "audit", "tune"])
def test_operations_not_measured_again_stay_with_their_origin(tmp_path, suite):
    def write(n, *ops):
        about = {**ABOUT, "device": f"device {n}", "date": f"day {n}"}
        report.write(tmp_path, about, named(suite, *ops, n=n))
        read = json.loads((tmp_path / "results.json").read_text())
        found = [(row["op"], row["implementation"][-1]) for row in read["suites"][suite]]
        return found, {key: told["date"][-1] for key, told in read.get("earlier", {}).items()}

    assert write(1, "attention", "attention", "rope") == (
        [("attention", "1"), ("attention", "1"), ("rope", "1")], {}
    )  # fmt: skip
    assert write(2, "rope", "rope") == (
        [("attention", "1"), ("attention", "1"), ("rope", "2"), ("rope", "2")],
        {f"{suite} attention": "1"},
    )
    html = (tmp_path / "index.html").read_text()
    assert html.count("another run") == 1
    assert "attention: from another run (day 1): device device 1." in html
    assert (tmp_path / f"{suite}.csv").read_text().count("\n") == 1 + 4
    # The same run again, as after each problem.
    assert write(2, "rope", "rope", "adamw")[1] == {f"{suite} attention": "1"}
    # A third run: what stays is of two.
    assert write(3, "adamw") == (
        [("attention", "1"), ("attention", "1"), ("rope", "2"), ("rope", "2"), ("adamw", "3")],
        {f"{suite} attention": "1", f"{suite} rope": "2"},
    )
    report.write(tmp_path, ABOUT, {"model": [{"implementation": "eager"}]})
    earlier = json.loads((tmp_path / "results.json").read_text())["earlier"]
    assert {key: told["date"][-1] for key, told in earlier.items()} == {
        f"{suite} attention": "1", f"{suite} rope": "2", f"{suite} adamw": "3",
    }  # fmt: skip
    assert write(4, "attention", "rope", "adamw") == (
        [("attention", "4"), ("rope", "4"), ("adamw", "4")], {"model": "2"}
    )  # fmt: skip


@pytest.mark.parametrize("suite", ["model", "decode"])
def test_suites_without_operations_are_replaced_whole(tmp_path, suite):
    for n in (1, 2):
        report.write(tmp_path, ABOUT, {suite: [{"implementation": "eager", "note": n}]})
    read = json.loads((tmp_path / "results.json").read_text())
    assert [row["note"] for row in read["suites"][suite]] == [2] and "earlier" not in read


def test_a_run_of_all_suites_again_has_no_earlier_ones(tmp_path):
    report.write(tmp_path, ABOUT, suites())
    report.write(tmp_path, ABOUT, suites())
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"about", "suites"}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"about": 1, "suites": {}}', '{"about": {}, "suites": [1]}']
)
def test_results_that_are_not_ours_are_not_overwritten(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UsageError, match="holds other things than a profile; name another"):
        report.write(tmp_path, ABOUT, {"kernels": kernels()})
    assert (tmp_path / "results.json").read_text() == content
    assert len(list(tmp_path.iterdir())) == 1


def test_a_write_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    report.write(tmp_path, ABOUT, {"kernels": kernels()})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write(tmp_path, ABOUT, {"model": suites()["model"]})
    assert {n: (tmp_path / n).read_bytes() for n in before} == before


# Numbers in words


@pytest.mark.parametrize(
    "value, words",
    [(None, "-"), (math.nan, "-"), (True, "-"), ("7", "-"), (0, "0"), (0.01234, "0.0123")]
    + [(0.99999, "1.00"), (1.234, "1.23"), (9.999, "10.0"), (12.34, "12.3"), (99.96, "100")]
    + [(123456.7, "123457"), (-2.5, "-2.50")],
)
def test_short(value, words):
    assert pivot.short(value) == words


def test_units():
    assert [pivot.size(x) for x in (None, 5, 3 << 20, 80 << 30)] == [
        "-", "5.00 B", "3.00 MiB", "80.0 GiB",
    ]  # fmt: skip
    assert [pivot.duration(x) for x in (None, 12.3, 4567, 8e6)] == [
        "-", "12.3 us", "4.57 ms", "8.00 s",
    ]  # fmt: skip
    assert pivot.share(0.254) == "25" and pivot.share(None) == "-"
    assert pivot.spread([1, 2.5]) == "1.00..2.50" and pivot.spread(0.5) == "0.500"


# Side by side


def test_the_ratio_is_to_the_best_other():
    rows = [kernel("a", "s", "bf16", "forward", n, us) for n, us in (("eager", 9), ("flash", 3))]
    (line,) = pivot.lines([*rows, kernel("a", "s", "bf16", "forward", "triton", 2.0)])
    assert line.best(ours=False) == "flash" and line.ratio == 1.5
    (line,) = pivot.lines(rows)
    assert line.ratio is None and line.ours == {}
    (line,) = pivot.lines([*rows, kernel("a", "s", "bf16", "forward", "triton", None, error="x")])
    assert line.ratio is None and line.ours["error"] == "x"
    speeds = [{"implementation": n, "tokens_per_s": v} for n, v in (("eager", 50), ("triton", 75))]
    speeds.append({"implementation": "compile", "tokens_per_s": 40})
    (line,) = pivot.lines(speeds, ("batch",), "tokens_per_s", higher=True)
    assert line.ratio == 1.5


def test_implementations_stand_in_order():
    names = ["triton", "zeta", "eager", "triton_tma", "vendor", "compile", "alpha"]
    assert pivot.implementations({"implementation": n} for n in names) == [
        "eager", "compile", "vendor", "alpha", "zeta", "triton", "triton_tma",
    ]  # fmt: skip


def test_equal_remarks_are_told_once():
    rows = [kernel("a", f"s{i}", "bf16", "forward", "cudnn", None, error="no") for i in range(3)]
    rows.append(kernel("a", "s", "bf16", "forward", "triton", 1.0, note="clock wandered"))
    rows.append(kernel("a", "s", "bf16", "forward", "eager", None))
    assert pivot.remarks("kernels", rows) == [
        "cudnn (a s0 bf16 forward and 2 more): not measured: no",
        "triton (a s bf16 forward): clock wandered",
        "eager (a s bf16 forward): not measured: no reason was recorded",
    ]


# Text tables


def test_the_kernels_table_has_a_line_for_each_case():
    told = report.table("kernels", kernels())
    blocks = [block.splitlines() for block in told.split("\n\n")]
    title = "median us; +-%: the widest spread; %: ours, of the ceiling"
    tables = [f"{op}, {title}" for op in EAGER_US]
    tables.insert(2, "attention, times as fast as")
    assert [block[0] for block in blocks] == tables
    norm, attention = blocks[0], blocks[1]
    header = "shape dtype pass eager compile triton +-% vs best GB/s %"
    assert re.sub(" +", " ", norm[1]) == header
    assert "flash" in attention[1] and "cudnn" in attention[1]
    assert len(norm) == 2 + 8 and len(attention) == 2 + 8
    # Of 0.4 us of 15.1.
    assert norm[2].split() == "4x1024x512 bf16 fwd 68.0 34.0 15.1 2.6 2.25x 1500 35".split()
    assert attention[2].split()[-3:] == ["0.90x", "210", "35"]
    assert any("failed" in line and "1.12x" in line for line in attention)
    assert len({len(line) for line in attention[1:]}) == 1
    assert all(len(line) <= 100 for line in told.splitlines())
    last = told.splitlines()[-1]
    assert last == (
        "  cudnn (attention 8x2048x1024 fp32 forward): not measured: RuntimeError: "
        "no engine for fp32"
    )


def test_attention_is_compared_with_each_of_the_vendors():
    """Case by case: 900 us by 4.5 is ours, by 4 and 5 theirs; of one case cudnn has none."""
    block = next(b for b in report.table("kernels", kernels()).split("\n\n") if "times as" in b)
    _, header, *lines = (line.split() for line in block.splitlines())
    assert header == ["shape", "dtype", "pass", "flash", "cudnn"]  # efficient was not measured
    assert lines[0] == ["4x1024x512", "bf16", "fwd", "1.12x", "0.90x"] and len(lines) == 8
    assert ["8x2048x1024", "fp32", "fwd", "1.12x", "-"] in lines
    both = [kernel("attention", "s", "bf16", "forward+backward", n, us) for n, us in
            (("efficient", 30.0), ("triton", 10.0))]  # fmt: skip
    told = report.table("kernels", both)
    assert told.splitlines()[-1].split() == ["s", "bf16", "fwd+bwd", "3.00x"]
    assert "times as" not in report.table("kernels", both[:1])  # as where there is no GPU
    assert "times as" not in report.table("kernels", [{**r, "op": "rope"} for r in both])
    html = page.render(ABOUT, {"kernels": both})
    assert "<p>Times as fast as:</p>" in html and html.count("3.00x") == 1 + 1 + 3
    assert "Times as" not in page.render(ABOUT, {"kernels": both[:1]})


@pytest.mark.parametrize("name", ["triton", "flash"])
def test_wrong_numbers_have_no_speed(name):
    """Whether ours or another's: not the best, in no ratio, in no table."""
    wrong = {"note": "wrong numbers", "error": math.nan, "median_us": 1.234}
    times = {"eager": 40.0, "flash": 10.0, "triton": 20.0}
    rows = [kernel("attention", "s", "bf16", "forward", n, us) for n, us in times.items()]
    rows = [{**row, **wrong} if row["implementation"] == name else row for row in rows]
    (line,) = pivot.lines(rows)
    assert line.measured(name) is None and line.best(ours=name == "triton") in (None, "eager")
    assert line.ratio == (None if name == "triton" else 2.0)
    told, html = report.table("kernels", rows), page.render(ABOUT, {"kernels": rows})
    assert " wrong " in told.splitlines()[2] and "wrong numbers" in told.splitlines()[-1]
    assert "times as fast" not in told
    assert ">wrong</td>" in html and ">wrong</text>" in html
    for shown in (told, html):
        assert "1.23" not in shown and ("210" in shown) == (name == "flash" or shown is html)


def test_an_error_in_the_interpreter_stands_beside_no_other():
    note = "needs a GPU to be timed; in Triton's interpreter, at T7, its error is 2.0e-03"
    rows = [
        kernel("rope", "T4096", "bf16", "forward", "eager", 9.0, error=4e-3),
        kernel("rope", "T4096", "bf16", "forward", "triton", None, error=None, note=note)
        | {"interpreted_error": 2e-3, "tflops": None, "gbps": None, "percent_of_ceiling": None},
    ]
    told = report.table("kernels", rows).splitlines()
    assert told[1].split()[-1] == "eager's" and told[2].split()[-1] == "4.0e-03"
    assert "2.0e-03" not in told[2] and told[-1].endswith(note)


@pytest.mark.parametrize("suite", ["model", "decode", "roofline", "audit"])
def test_other_tables_are_aligned(suite):
    rows = suites()[suite]
    header = {"decode": 2}.get(suite, 1)
    remarks = len(pivot.remarks(suite, rows))
    told = report.table(suite, rows).splitlines()
    assert len(told) == header + len(rows) // (2 if suite == "decode" else 1) + remarks
    table = told[header - 1 : len(told) - remarks]
    assert all(len(line) <= (140 if suite == "audit" else 100) for line in table)
    words = [[m.end() for m in re.finditer(r"\S+(?: \S+)*", line)] for line in table[:2]]
    assert words[0][-2:] == words[1][-2:]


@pytest.mark.parametrize("suite", [*pivot.SUITES, "unknown"])
def test_a_table_of_nothing_or_of_none_is_still_told(suite):
    assert report.table(suite, []) == f"{suite}: nothing was measured"
    row = dict.fromkeys([*report.COLUMNS.get(suite, "what").split()])
    assert report.table(suite, [row, {}])


# The page


@pytest.fixture(scope="module")
def html():
    return page.render(ABOUT, suites())


def test_the_page_is_well_formed_and_stands_alone(html):
    read = Reader(html)
    assert ("html", {"lang": "en"}) in read.tags
    assert "viewport" in {a.get("name") for a in read.all("meta")}
    links = [a[k] for _, a in read.tags for k in ("src", "href", "action", "data") if k in a]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bfetch\(", html)
    assert "prefers-color-scheme: dark" in html
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert html.count("{") == html.count("}")


def test_the_page_tells_everything(html):
    words = " ".join(Reader(html).words)
    for value in [*ABOUT.values()]:
        assert isinstance(value, dict) or value in words
    assert "bf16 600 TFLOP/s, fp32 50.0 TFLOP/s, memory 4000 GB/s" in words
    for wanted in ("Kernels", "Model", "Decode", "Roofline", "Audit", "Remarks", *EAGER_US):
        assert wanted in words
    assert "0.90x cudnn" in words and "RuntimeError: no engine for fp32" in words
    assert "CompilationError: <unknown>" in words
    read = Reader(html)
    assert len(read.all("svg", role="img")) == 3 * 8 + 1 + 2 + 1
    assert len(read.all("table")) == (1 + 3 + 1) + 1 + 1 + 1 + 1


def test_hostile_words_are_escaped():
    rows = {
        suite: [dict.fromkeys(row, HOSTILE) | {HOSTILE: HOSTILE} for row in its]
        + [{**row, "op": HOSTILE, "implementation": HOSTILE, "error": HOSTILE} for row in its]
        for suite, its in suites().items()
    }
    rows["extra"] = [{HOSTILE: HOSTILE}]
    about = dict.fromkeys(ABOUT, HOSTILE) | {HOSTILE: HOSTILE, "ceilings": {HOSTILE: HOSTILE}}
    about["ceilings"][HOSTILE + "_tflops"] = 5.0
    html = page.render(about, rows, {"model": {"device": HOSTILE + "2"}})
    read = Reader(html)
    assert len(read.all("script")) == 1 and not read.all("img")
    assert HOSTILE in " ".join(read.words)
    assert not any(key.startswith("on") for _, a in read.tags for key in a)


@pytest.mark.parametrize("suite", [*pivot.SUITES, "unknown"])
def test_the_page_bears_what_is_missing(suite):
    Reader(page.render({}, {}))
    Reader(page.render({}, {suite: []}))
    row = dict.fromkeys(report.COLUMNS.get(suite, "what").split())
    Reader(page.render({"device": None, "ceilings": None}, {suite: [row, {}]}))
    for full in suites().get(suite, [])[:1]:
        for key in full:
            Reader(page.render(ABOUT, {suite: [{**full, key: None}]}))


def test_suites_not_measured_are_named():
    words = " ".join(Reader(page.render(ABOUT, {"model": suites()["model"]})).words)
    assert words.count("this suite was not measured") == 4


# Figures


def place(attributes):
    return tuple(map(float, re.findall(r"-?[\d.]+", attributes["transform"])))


def under(x, roofs):
    """Return the least y in pixels (SVG's y runs down) of the roofs at x, each line extended."""
    heights = []
    for a in roofs:
        x1, y1, x2, y2 = (float(a[k]) for k in ("x1", "y1", "x2", "y2"))
        heights.append(y1 + (x - x1) * (y2 - y1) / (x2 - x1))
    return max(heights)


def test_dots_lie_under_their_roofs():
    rows = rooflines()
    read = Reader(plot.roofline(rows, ABOUT["ceilings"]))
    roofs = {a["data-roof"]: a for a in read.all("line")}
    assert set(roofs) == {"memory", "bf16", "fp32"}
    dots = read.all("g")
    assert len(dots) == len(rows)
    ordered = sorted(rows, key=lambda r: r["implementation"] == "triton")
    for row, dot in zip(ordered, dots, strict=True):
        x, y = place(dot)
        assert 56 <= x <= 744 and 20 <= y <= 412
        roof = under(x, [roofs["memory"], roofs[row["dtype"]]])
        # A decade has the same height everywhere, so the distance tells the share.
        decade = (412 - 20) / 4
        assert y > roof
        assert 10 ** ((roof - y) / decade) == pytest.approx(row["percent"] / 100, rel=0.01)


def test_a_dot_over_the_roof_is_drawn_there():
    rows = [{**rooflines()[0], "implementation": "triton", "intensity": 1.0, "tflops": 8.0}]
    read = Reader(plot.roofline(rows, ABOUT["ceilings"]))
    (memory,) = read.all("line", **{"data-roof": "memory"})
    x, y = place(read.all("g")[0])
    assert y < under(x, [memory])


@pytest.mark.parametrize(
    "ceilings", [{}, {"memory_gbps": 3000.0}, {"bf16_tflops": 9.0, "memory_gbps": None}]
)
def test_a_roofline_without_all_roofs(ceilings):
    read = Reader(plot.roofline(rooflines(), ceilings))
    assert len(read.all("line")) == sum(v is not None for v in ceilings.values())
    for line in read.all("line"):
        assert all(0 <= float(line[k]) <= 760 for k in ("x1", "y1", "x2", "y2"))
    assert plot.roofline([{"intensity": None, "tflops": 3.0}], ceilings) == ""


def test_bars_are_as_long_as_their_values():
    items = [("eager", 8.0, "8 us", "a"), ("triton", 2.0, "2 us", "b"), ("odd", None, "none", "c")]
    widths = [float(a["width"]) for a in Reader(plot.bars("x", items)).all("rect")]
    assert widths == [210.0, 52.5]


def test_a_decode_curve_passes_its_points():
    rows = [row for row in suites()["decode"] if row["batch"] == 8]
    read = Reader(plot.decode(rows))
    dots = [place(a) for a in read.all("g")]
    assert len(dots) == len(rows)
    assert [x for x, _ in dots[:6]] == sorted(x for x, _ in dots[:6])
    speeds = [row["tokens_per_s"] for row in rows]
    heights = [200 - y for _, y in dots]
    assert heights == pytest.approx([s * heights[0] / speeds[0] for s in speeds], abs=0.02)
    assert len(read.all("path")) == 3 + 2 + len(rows)
    assert plot.decode([{"context": None, "tokens_per_s": 1}]) == ""
    assert plot.decode([{"context": 64, "tokens_per_s": 1.0, "implementation": "eager"}])
