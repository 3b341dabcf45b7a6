"""The parts of the screen: lines, the bar at every width, the table, the remaining time."""

import io
import re
import sys
import threading
import time
from collections import deque

import pytest

from minillm.runtime import console
from minillm.runtime.console import clock
from minillm.training.outlook import Outlook
from minillm.training.reporter import Reporter
from minillm.training.table import Table, fitting, speed

BARS = (" 12%", "evaluating", "saving")
ROW = {
    "step": 12345, "tokens": 64, "loss": 12.3456, "val_loss": 11.5, "val_bpb": 1.7125, "lr": 1e-3,
    "grad_norm": 0.5,
}  # fmt: skip


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """terminal() -> standard error as a terminal, and a setter of its width (80 at first).

    To be called in the test: pytest puts its own stream there after the fixtures.
    """
    columns, stream = [80], Terminal()

    def begin():
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(console, "width", lambda s: columns[0] if s.isatty() else None)
        return stream, lambda n: columns.__setitem__(0, n)

    return begin


def test_the_bar_and_the_rows_fit_every_width_from_40_to_200(tmp_path, terminal):
    stream, set_columns = terminal()
    report = Reporter(tmp_path / "metrics.jsonl", 12344, 99_999, 1.0, 1.0)
    report.outlook.steps = deque([1.5] * 9, maxlen=9)
    report.step(987_654_321, 99_999, loss=12.34567)
    for columns in range(40, 201):
        set_columns(columns)
        stream.seek(stream.truncate(0))
        report.row(ROW)
        for what, total in (("evaluating", 12345), ("saving", 0)):
            with report.doing(what, total):
                report.tick()
        lines = re.split(r"[\r\n]|\x1b\[[JK]", stream.getvalue())
        assert max(map(len, lines)) < columns
        bars = {word: [x for x in lines if x.startswith(word)] for word in BARS}
        assert all(bars.values())
        assert all("|" in x and " left" in x for x in bars[" 12%"])
        assert all("|" in x for x in bars["evaluating"])
        assert not any("|" in x for x in bars["saving"])
        if columns >= 60:
            assert all("step 12345/99999" in x for x in bars["saving"])
            assert all(" 12345/99999  " in x for x in bars[" 12%"])
            assert all("/12345  " in x for x in bars["evaluating"])
    report.close()
    # More is shown where there is more space.
    assert len(fitting(40)) < len(fitting(60)) < len(fitting(80)) < len(fitting(120))
    assert len(fitting(None)) == len(fitting(120)) == 9


def test_a_bar_shows_how_much_is_done(terminal):
    stream, set_columns = terminal()
    set_columns(40)
    view = console.View("label", 1, 2, (console.Fact(1, "more"), console.Fact(0, "a fact")))
    bar = console.Bar(lambda: view)
    drawn = stream.getvalue().strip("\r").removesuffix("\x1b[K\x1b[J")
    assert re.fullmatch(r"label \|█+ +\| more  a fact", drawn) and len(drawn) == 39
    assert abs(drawn.count("█") - (39 - len("label || more  a fact")) / 2) < 1
    bar.close()
    assert stream.getvalue().endswith("\r\r\x1b[K\x1b[J\r\r")


def test_lines_from_another_thread_stand_above_the_bar(terminal):
    """The watch says from its own thread that a signal has come."""
    stream, _ = terminal()
    bar = console.Bar(lambda: console.View("label", 1, 2))
    for number in range(3):
        thread = threading.Thread(target=console.write, args=(f"line {number}",))
        thread.start()
        thread.join()
    bar.close()
    bare = re.sub(r"\x1b\[[JK]", "", stream.getvalue())
    kept = [line.split("\r")[-1] for line in bare.split("\n")]
    assert kept == ["line 0", "line 1", "line 2", ""]


def test_long_lines_are_wrapped_between_words_on_a_terminal_alone(terminal, monkeypatch):
    stream, set_columns = terminal()
    set_columns(40)
    text = "warning   " + "word " * 20 + "/a/path/that/is/longer/than/the/whole/line/is/wide"
    console.write(text)
    lines = stream.getvalue().splitlines()
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    assert all(len(line) < 40 for line in lines[:-1]) and lines[1].startswith(" " * 10 + "word")
    assert lines[-1].split() == ["/a/path/that/is/longer/than/the/whole/line/is/wide"]
    console.write(command := "go on with: " + "word " * 20)  # to be copied in one piece
    assert stream.getvalue().endswith(command + "\n")
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    console.write(text)
    assert pipe.getvalue() == text + "\n"


def test_what_takes_a_while_is_named_and_leaves_nothing(terminal, monkeypatch):
    stream, _ = terminal()
    with console.busy("reading"):
        console.write("a line")
    shown = re.sub(r"\x1b\[[JK]", "", stream.getvalue())
    assert "reading" in shown and [x.split("\r")[-1] for x in shown.split("\n")] == ["a line", ""]
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    with console.busy("reading"), console.busy("reading", shown=False):
        pass
    assert pipe.getvalue() == ""


def test_the_heading_is_printed_once_and_again_after_other_text():
    table = Table()
    counts = [len(table.lines(ROW, 80)) for _ in range(5)]
    table.interrupt()
    counts += [len(table.lines(ROW, columns)) for columns in (80, 80, 120, 120)]
    assert counts == [2, 1, 1, 1, 1, 2, 1, 2, 1]
    assert sum(len(table.lines(ROW, 120)) - 1 for _ in range(100)) == 2


def test_columns_stand_below_their_headings():
    heading, line = Table().lines({**ROW, "elapsed": 61, "remaining": 3600}, None)
    for name, text in (("step", "12345"), ("loss", "12.3456"), ("val loss", "11.5000"),
                       ("elapsed", "1:01"), ("remaining", "1:00:00")):  # fmt: skip
        end = heading.index(name) + len(name)
        assert line[:end].endswith(text)


def test_times_and_speeds_are_short():
    times = {0: "0:00", 9.4: "0:09", 59.6: "1:00", 754: "12:34", 3600: "1:00:00",
             86400: "24:00:00", 4 * 86400 + 3 * 3600: "4d 03h"}  # fmt: skip
    assert {t: clock(t) for t in times} == times
    assert [speed(x) for x in (1.25, 12345.6, 9_999_999, 12.345e6)] == [
        "1.2", "12,346", "9,999,999", "12.3M"
    ]  # fmt: skip


# The remaining time.


def steps(*seconds: float) -> deque:
    return deque(seconds, maxlen=50)


def test_no_remaining_time_is_made_up():
    """Neither at the start nor right after a resume is there a step to judge by."""
    assert Outlook().remaining(0, 100) is None
    assert Outlook(steps=steps(1.0, 1.0)).remaining(500, 1000) is None
    assert Outlook(steps=steps(1.0, 1.0, 4.0)).remaining(500, 1000) == 1000


def test_remaining_time_counts_what_is_done_besides_training():
    outlook = Outlook(
        every={"evaluating": 10, "saving": 50, "sampling": 0}, batches=4, final_batches=30,
        parts=2, steps=steps(6.0, 6.0, 6.0),
    )  # fmt: skip
    # A forward pass is a third of a step, and a batch of the evaluation half of a step's.
    evaluations, end = 8, 30 * 1.0
    assert outlook.remaining(15, 100) == pytest.approx(85 * 6 + evaluations * 4 * 1.0 + end)
    outlook.batch, outlook.took = 0.5, {"evaluating": 3.0, "saving": 7.0, "sampling": 2.0}
    mid = evaluations * (4 * 0.5 + 3) + 7  # a sample is taken at the end alone
    assert outlook.remaining(15, 100) == pytest.approx(85 * 6 + mid + 15 + 12)
    assert outlook.remaining(100, 100) == pytest.approx(15 + 12)
    outlook.final_batches, outlook.took = 0, {}
    assert outlook.remaining(100, 100) == 0


def test_remaining_time_keeps_to_the_time_limit():
    outlook = Outlook(
        elapsed=lambda: 100.0, limit=130.0, final_batches=6, parts=1, steps=steps(3.0, 3.0, 3.0)
    )
    assert outlook.remaining(10, 1000) == 30 + 6  # then the last evaluation
    assert outlook.remaining(10, 15) == 15 + 6
    outlook.limit = 50.0
    assert outlook.remaining(10, 1000) == 6


def test_steps_are_timed_without_pauses_and_without_the_first(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    report = Reporter(tmp_path / "metrics.jsonl", 0, 9, 1.0, 1.0)
    for seconds in (60.0, 1.0, 2.0):
        now[0] += seconds
        report.step(64, 9)
        with report.paused(), report.doing("evaluating", 5):
            now[0] += 10
    assert list(report.outlook.steps) == [1.0, 2.0] and report.outlook.batch == 2.0
    with report.doing("evaluating by r", 5, of="evaluating"):
        now[0] += 4
    assert report.outlook.took == {"evaluating": 4.0} and report.outlook.batch == 2.0
