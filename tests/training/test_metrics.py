"""What a run reports: rows of metrics.jsonl, lines in a pipe, a bar on a terminal."""

import io
import json
import signal
import sys
import time

import pytest

from minillm.training.reporter import Reporter

ROW = {"step": 1, "tokens": 64, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "peak_memory_mib": None}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved: clock[0] seconds."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_carries_the_speed_since_the_last(tmp_path, clock, capsys):
    path = tmp_path / "metrics.jsonl"
    report = Reporter(path, 0, 4, flops_per_token=100.0, peak_flops=1e6)
    for _ in range(2):
        clock[0] += 0.5
        report.step(64, 4)
    with report.paused():
        clock[0] += 7  # an evaluation
    report.row({**ROW, "step": 2})
    report.row({"step": 2, "tokens": 128, "val_loss": 2.25, "val_bpb": 1.5})
    report.close()
    first, second = rows(path)
    assert first == {
        **ROW, "step": 2, "step_ms": 500.0, "tokens_per_s": 128.0, "mfu": 128 * 100 / 1e6
    }  # fmt: skip
    assert second == {"step": 2, "tokens": 128, "val_loss": 2.25, "val_bpb": 1.5}
    lines = capsys.readouterr().err.splitlines()
    assert [line.split() for line in lines] == [
        "step loss val loss bits/byte lr grad norm tokens/s elapsed remaining".split(),
        ["2", "2.5000", "1.00e-03", "0.50", "128", "0:08"],  # elapsed; remaining: not known yet
        ["2", "2.2500", "1.5000", "0:08"],
    ]


def test_numbers_that_are_not_finite_become_null(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    report = Reporter(path, 0, 4, 1.0, 1.0)
    report.row({**ROW, "loss": float("nan"), "grad_norm": float("inf")})
    report.close()
    assert rows(path)[0]["loss"] is None and rows(path)[0]["grad_norm"] is None


def test_a_resume_cuts_what_came_after_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in (1, 2, 2, 3, 4)]
    path.write_bytes("\n".join([*lines, "7", "[]", "{}"]).encode() + b'\n\xff\xfe\n{"step": 2, "lo')
    Reporter(path, 2, 9, 1.0, 1.0).close()
    assert [row["step"] for row in rows(path)] == [1, 2, 2]
    assert path.read_bytes().endswith(b"\n")


def test_a_log_that_needs_no_cut_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    before = path.stat()
    Reporter(path, 2, 9, 1.0, 1.0).close()
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino


@pytest.fixture
def small_disk():
    """small_disk(n): from now on the system writes no file beyond n bytes; None: any."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(n_bytes: int | None) -> None:
        limits = before if n_bytes is None else (n_bytes, before[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def test_a_full_disk_costs_rows_not_the_run(tmp_path, capsys, small_disk):
    path = tmp_path / "metrics.jsonl"
    report = Reporter(path, 0, 9, 1.0, 1.0)
    report.row({**ROW, "step": 1})
    whole = path.read_bytes()
    small_disk(len(whole) + 10)
    for step in (2, 3):
        report.row({**ROW, "step": step})
        assert path.read_bytes() == whole  # nor half a row
    small_disk(None)
    report.row({**ROW, "step": 4})
    report.close()
    assert [row["step"] for row in rows(path)] == [1, 4]
    lines = capsys.readouterr().err.splitlines()
    warnings = [line for line in lines if line.startswith("warning")]
    assert warnings == [f"warning   {path}: File too large; rows are left out meanwhile"]
    assert [line.split()[0] for line in lines if line not in warnings] == ["step", *"1234"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("name, bars", [("xterm", True), ("dumb", False)])
def test_a_terminal_gets_a_bar_unless_it_cannot_redraw_a_line(tmp_path, monkeypatch, name, bars):
    monkeypatch.setenv("TERM", name)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    report = Reporter(tmp_path / "metrics.jsonl", 0, 4, 1.0, 1.0)
    report.step(64, 4, loss=2.5)
    report.row(ROW)
    report.say("a word")
    report.close()
    shown = terminal.getvalue()
    assert "a word\n" in shown and "  2.5000" in shown
    assert ("1/4  loss 2.500" in shown) == ("\r" in shown) == bars


def test_other_ranks_print_nothing(capfd):
    report = Reporter(None, 0, 4, 1.0, 1.0)
    report.step(64, 4)
    with report.doing("evaluating", 2):
        report.tick()
    report.row(ROW)
    report.sample("a heading", "a text", sys.stderr)
    report.close()
    assert capfd.readouterr() == ("", "")
