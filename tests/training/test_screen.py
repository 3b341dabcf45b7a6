"""What a user sees of a training, on a terminal and in a pipe."""

import json
import re
import sys

import pytest

pytest.importorskip("pty")

from tests.support.screens import terminal  # noqa: E402

ROW = re.compile(r" {3,}\d+ +\d.*")
FLAGS = (
    "--steps", "8", "--log-every", "1", "--eval-every", "4", "--sample-every", "4",
    "--tokenizer", "char",  # which writes nothing that would move the cursor
)  # fmt: skip


@pytest.fixture(scope="module")
def seen(train, tmp_path_factory):
    """seen(columns) -> the screen after a training on a terminal of that width."""
    found = {}

    def at(columns: int):
        if columns not in found:
            out = tmp_path_factory.mktemp("run") / "run"
            with pytest.MonkeyPatch.context() as patch, terminal(columns) as (stream, screen):
                patch.setenv("TERM", "xterm")
                patch.setattr(sys, "stderr", stream)
                assert train("--out", out, *FLAGS) == 0
            found[columns] = screen
        return found[columns]

    return at


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_every_logged_step_and_evaluation_leaves_one_line(seen, columns):
    rows = [line for line in seen(columns).shown if ROW.fullmatch(line)]
    # The last step is logged before its evaluation, which takes a while.
    assert [int(row.split()[0]) for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert all(len(row) < columns for row in rows)
    heading = next(line for line in seen(columns).shown if line.lstrip().startswith("step "))
    names = ["step", "loss", "val loss", "remaining"]
    names += ["tokens/s", "elapsed"] * (columns >= 80) + ["lr", "grad norm"] * (columns >= 120)
    assert all(name in heading for name in names)
    assert len(heading) < columns


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_nothing_is_printed_twice_and_the_bar_is_gone_at_the_end(seen, columns):
    shown = seen(columns).shown
    heading = next(line for line in shown if line.lstrip().startswith("step "))
    lines = [line for line in shown if line.strip() and line != heading]
    samples = [i for i, line in enumerate(lines) if line.startswith("--- sample")]
    rows = [line for line in lines if ROW.fullmatch(line)]
    assert len(set(rows)) == len(rows) and len(samples) == 2
    assert not any("|" in line for line in lines)
    for word in ("training ", "model ", "sample at step 8", "validation: ", "sample it:"):
        assert sum(word in line for line in lines) == 1, word


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_bar_says_what_is_being_done(seen, columns):
    raw = seen(columns).raw
    drawn = [line for line in re.split(r"[\r\n]|\x1b\[[JK]", raw) if "|" in line]
    assert all(len(line) < columns for line in drawn)
    assert any(line.startswith("evaluating |") for line in drawn)
    assert any(line.startswith("sampling |") for line in drawn)
    assert any("saving" in line for line in re.split(r"[\r\n]|\x1b\[[JK]", raw))
    assert any(re.match(r" *\d+% \|.*\d/8", line) for line in drawn)


def test_every_sample_has_a_heading(train, tmp_path, capfd):
    more = ("--sample-prompt", "the cat ", "--out", tmp_path / "run")
    assert train(*FLAGS, *more) == 0
    out, err = capfd.readouterr()
    headings = [line for line in err.splitlines() if line.startswith("--- sample")]
    assert headings == [
        f'--- sample at step {step}, prompt "the cat " ---' for step in (4, 8)
    ]  # fmt: skip
    kept = (tmp_path / "run" / "samples.txt").read_bytes().decode()
    parts = re.split(r'^=== step (\d), prompt "the cat "\n', kept, flags=re.MULTILINE)
    assert parts[1::2] == ["4", "8"]
    assert all(part.startswith("the cat ") and len(part) > 20 for part in parts[2::2])
    assert out == parts[-1]


def test_a_sample_prompt_that_cannot_be_encoded_is_refused_at_the_start(train, tmp_path, capfd):
    flags = ("--sample-prompt", "the \u00e9", "--out", tmp_path / "run")
    assert train(*FLAGS, *flags) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert "--sample-prompt: character '\\xe9' at position 4" in last
    assert not (tmp_path / "run").exists()


def test_a_pipe_gets_the_same_rows_with_elapsed_and_remaining_time(train, tmp_path, capfd):
    assert train("--out", tmp_path / "run", *FLAGS) == 0
    err = capfd.readouterr().err
    assert "\r" not in err and "\x1b" not in err and "|" not in err
    lines = err.splitlines()
    first = next(i for i, line in enumerate(lines) if line.lstrip().startswith("step "))
    ends = {name: lines[first].index(name) + len(name) for name in ("elapsed", "remaining")}
    rows = [line for line in lines if ROW.fullmatch(line)]
    assert [int(row.split()[0]) for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    for row in rows:
        assert re.fullmatch(r" +\d+:\d\d", row[ends["elapsed"] - 10 : ends["elapsed"]])
    for row in rows[4:]:  # the first steps are no measure of the others
        assert re.fullmatch(r" +\d+:\d\d", row[ends["remaining"] - 10 : ends["remaining"]])


def test_a_recurrent_run_shows_its_loss_by_r(train, tmp_path, capfd):
    flags = ("--recurrent", "1,1,1", "--mean-recurrence", "3", "--eval-batches", "2")
    assert train("--out", tmp_path / "run", *flags) == 0
    err = capfd.readouterr().err
    shown = [line for line in err.splitlines() if line.startswith("loss at r ")]
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())
    found = [row for row in rows if "val_loss_at_r" in row]
    assert len(shown) == len(found) == 2
    for line, row in zip(shown, found, strict=True):
        # One row is of one set of windows.
        assert row["val_loss_at_r"]["3"] == row["val_loss"]
        for r, loss in row["val_loss_at_r"].items():
            assert f"{r}: {loss:.3f}" in line
    assert "hardly used" not in err  # true of every model after eight steps
