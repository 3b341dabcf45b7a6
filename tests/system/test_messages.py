"""The wording of every refusal in one file, tests/golden/messages.txt.

Tests elsewhere assert facts: the code, the flag, the number, the path. Here the whole line counts.
After a change of wording, `pytest tests/system/test_messages.py --update-messages` writes the file
again, and the difference is to be read.
"""

import contextlib
import importlib.util
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from minillm import __main__ as verbs
from minillm.runtime import program
from tests.support.refusals import MAINS
from tests.system import (
    test_bad_input as general,
    test_bad_input_names as names,
    test_bad_input_verbs as by_verb,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "messages.txt"
VERBS = [[], ["trian"], ["--train"], ["train", "--stpes", "1"], ["sample", "none"]]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available() or not importlib.util.find_spec("triton"),
    reason="other machines refuse other things",
)


def refused(name: str, words: Sequence[str], run: Callable[[], int]) -> str:
    """Return the exit code of a program that refuses, with its message."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = run()
    line = (err.getvalue().splitlines() or [""])[-1]
    start = f"{name}: error: "
    assert line.startswith(start), (words, code, err.getvalue())
    return f"{code} {line.removeprefix(start)}"


def plain(word: str) -> str:
    """Return a word of a command line, quoted if need be, and without the middle of a long one."""
    word = word if len(word) <= 60 else f"{word[:25]}...{word[-25:]}"
    return word if re.fullmatch(r"[\w./:,=*{}+-]+", word, re.ASCII) else ascii(word)


def plain_cases(table: list) -> Iterator[tuple]:
    """Yield the rows of a table of cases, without the marks of some."""
    for row in table:
        yield tuple(getattr(row, "values", row))


@pytest.fixture
def everything(train, tiny_run, text_file, tmp_path, monkeypatch) -> dict[str, str]:
    """Every refusal that the tables of bad input know: command line -> code and message."""
    (tmp_path / "t").mkdir()
    place = general.with_unpleasant_things(tmp_path / "t")
    monkeypatch.setattr("minillm.kernels._launch.interpreted", lambda: False)
    found: dict[str, str] = {}

    def without_folders(text: str) -> str:
        folders = {"{t}": place, "{run}": tiny_run, "{tmp}": tmp_path, "{text}": text_file.parent}
        for shown, folder in folders.items():
            text = text.replace(str(folder), shown)
        # Where a long line is cut depends on how long the names of the folders are.
        text = re.sub(r"(\d)\1{20,}(\.{3}\1*)?", r"\1...\1", text)
        return re.sub(r"[\d.,]+ GiB are free", "N GiB are free", text)

    def add(name: str, words: Sequence[str], code: Callable[[], int] | None = None) -> None:
        words = general.filled(list(words), place, tiny_run)
        line = refused(name, words, code or (lambda: program.run(name, MAINS[name], words)))
        found[" ".join([name, *(plain(without_folders(w)) for w in words)])] = without_folders(line)

    def add_train(words: list[str]) -> None:
        words = general.filled(words, place, tiny_run)
        out = [] if {"--resume", "--out"} & set(words) else ["--out", str(tmp_path / "new")]
        add("train.py", words, lambda: train(*words, *out))

    for words, *_ in plain_cases(general.TRAIN):
        add_train(words)
    for words, *_ in plain_cases(general.SAMPLE):
        add("sample.py", ["{run}", *words])
    for number, (content, ending, _) in enumerate(general.CONFIGS):
        path = tmp_path / f"{number}.{ending}"
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        add("train.py", ["--config", str(path), "--out", "x"])
    (tmp_path / "v").mkdir()
    monkeypatch.chdir(by_verb.with_bad_files(tmp_path / "v"))
    for verb, words, *_ in (*by_verb.CASES, *by_verb.NO_DEVICE):
        add(by_verb.FULL_NAME.get(verb, f"minillm {verb}"), words)
    (tmp_path / "n").mkdir()
    monkeypatch.chdir(names.with_unpleasant_names(tmp_path / "n"))
    for command, flag, more, _ in names.READ:
        for name in ("none", "text.txt/x", "fifo"):
            add(command, [*more, *filter(None, [flag]), name])
    for command, flag, more in names.WRITE:
        for name in ("text.txt", "text.txt/x", ""):
            add(command, [*more, flag, name])
    for words in VERBS:
        name = f"minillm {words[0]}" if words[:1] in (["train"], ["sample"]) else "minillm"
        monkeypatch.setattr(sys, "argv", ["minillm", *words])
        add(name, words[1:] if " " in name else words, verbs.main)

    return found


def test_messages_are_those_of_the_golden_file(everything, request):
    text = "".join(f"{command}\n    {line}\n" for command, line in sorted(everything.items()))
    if request.config.getoption("--update-messages"):
        GOLDEN.write_text(text, encoding="utf-8", newline="\n")
    written = GOLDEN.read_text("utf-8")
    assert text == written, "wording has changed; if it is meant: pytest --update-messages"
    assert len(everything) > 250
