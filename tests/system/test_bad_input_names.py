"""Names that cannot be read or written, given to every flag that takes one."""

import errno
import os
from pathlib import Path

import pytest

from minillm.commands import plan
from minillm.runtime import program
from tests.support.refusals import MAINS, refusal

pytestmark = pytest.mark.skipif(os.name != "posix", reason="these names are of POSIX systems")

# Command, flag ("": a bare word), what else it needs to get there, what it says of what is there
# and can be no such thing.
READ = [
    ("train.py", "--data", [], "not a regular file"),
    ("train.py", "--config", ["--print-config"], "not a regular file; expected a .toml or .json"),
    ("train.py", "--resume", [], "is a file, not a run folder"),
    ("train.py", "--init-from", [], "is a file, not a run folder"),
    ("train.py", "--tokenizer", ["--data", "text.txt"], "expected a tokenizer"),
    ("sample.py", "", [], "is a file, not a run folder"),
    ("sample.py", "--prompt-file", ["{run}"], "is no regular file"),
    ("minillm prepare", "", [], "not a regular file"),
    ("minillm prepare", "--tokenizer", ["text.txt"], "expected a tokenizer"),
    ("minillm plan", "--links", ["--gpus", "2"], "not a regular file"),
    ("minillm plan", "--config", [], "not a regular file"),
    ("minillm plan", "--resume", [], "is a file, not a run folder"),
]
ABSENT = ("no such", "Too many levels of symbolic links", "File name too long")
NAMES = {
    "none": "none",
    "newline": "new\nline",
    "not UTF-8": "caf\udce9",
    "escape": "\x1b[31mred",
    "300 letters": "x" * 300,
    "long path": "y/" * 2100,
    "loop": "loop",
    "dangling": "dangling",
    "below a file": "text.txt/x",
    "fifo": "fifo",
    "endless": "/dev/zero",
}
WRITE = [
    ("train.py", "--out", ["--data", "text.txt"]),
    ("train.py", "--cache-dir", ["--data", "text.txt"]),
    ("minillm prepare", "--out", ["text.txt", "--tokenizer", "byte"]),
    ("minillm prepare", "--cache-dir", ["text.txt", "--tokenizer", "byte"]),
    ("minillm profile", "--out", ["--quick"]),
    ("minillm plan", "--out", []),
]
UNWRITABLE = {
    "a file": "text.txt",
    "below a file": "text.txt/x",
    "300 letters": "x" * 300,
    "loop": "loop",
    "dangling": "dangling",
    "fifo": "fifo",
    "endless": "/dev/zero",
    "empty": "",
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The folder to stand in, with unpleasant names, on a machine that need not be timed."""
    monkeypatch.setattr(plan.hardware.device, "measured_peak_flops", lambda device, dtype: 1e10)
    monkeypatch.setattr(plan.hardware.ceilings, "ceilings", lambda *_, **__: {"memory_gbps": 10.0})
    monkeypatch.chdir(tmp_path)
    return with_unpleasant_names(tmp_path)


def with_unpleasant_names(folder: Path) -> Path:
    (folder / "text.txt").write_text("the cat sat on a mat\n" * 40)
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    return folder


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("command, flag, more, other", READ, ids=lambda x: x if x else None)
def test_what_cannot_be_read(here, tiny_run, capfd, command, flag, more, other, kind):
    words = [word.replace("{run}", str(tiny_run)) for word in more]
    line = refusal(command, [*words, *filter(None, [flag]), NAMES[kind]], 2, capfd)
    there = kind in ("fifo", "endless")
    assert other in line if there else any(what in line for what in (*ABSENT, "no file")), line
    # The name, or its end; what does not print is escaped.
    assert program.one_line(NAMES[kind])[-30:].rstrip("/") in line


@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("command, flag, more", WRITE, ids=lambda x: x if x else None)
def test_what_cannot_be_written(here, capfd, command, flag, more, kind):
    before = sorted(here.rglob("*"))
    line = refusal(command, [*more, flag, UNWRITABLE[kind]], 2, capfd)
    reasons = ("not a folder", "is a file", "exists and is not", "too long", "is empty",
               "is not a path")  # fmt: skip
    assert any(reason in line for reason in reasons), line
    assert sorted(here.rglob("*")) == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc to be unable to write to")
@pytest.mark.parametrize("place", ["/proc/new", "/proc/self/new"])
@pytest.mark.parametrize("command, flag, more", WRITE[:4], ids=lambda x: x if x else None)
def test_where_nothing_can_be_made(here, capfd, command, flag, more, place):
    small = ["--tokenizer", "byte", "--n-layer", "1", "--n-head", "1", "--d-model", "16",
             "--seq-len", "8", "--batch-size", "1", "--steps", "1"]  # fmt: skip
    words = [*more, *(small if command == "train.py" else [])]
    assert "/proc/" in refusal(command, [*words, flag, place], 5, capfd)


def test_a_folder_that_may_not_be_written(here, capfd, monkeypatch):
    # Not chmod: root writes everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for command, flag, more in WRITE[:5]:
        line = refusal(command, [*more, flag, "new"], 5, capfd)
        assert f"{here}: not writable; name another place" in line


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here fails to be read")
def test_a_file_that_fails_when_it_is_read(here, capfd):
    for command, words in (
        ("minillm prepare", ["/proc/self/mem"]),
        ("train.py", ["--data", "/proc/self/mem"]),
    ):
        line = refusal(command, words, 5, capfd)
        assert line.endswith("/proc/self/mem: " + os.strerror(errno.EIO))


@pytest.mark.parametrize(
    "command, words",
    [
        ("train.py", ["--print-config"]),
        ("minillm plan", []),
        ("minillm prepare", ["text.txt"]),
        ("minillm profile", ["--quick"]),
    ],
)
def test_the_folder_one_stands_in_is_gone(tmp_path, monkeypatch, capfd, command, words):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    line = refusal(command, words, 5, capfd)
    assert line.endswith("the folder that this was started in is gone; change to another")


@pytest.mark.parametrize("command", MAINS)
def test_a_word_that_no_flag_takes(capfd, command):
    takes_words = command in ("sample.py", "minillm prepare")
    words = ["--wrong\x1b[2J\n", "x"] if takes_words else ["wrong\x1b[2J\nword"]
    assert r"wrong\x1b[2J" in refusal(command, words, 2, capfd)
