"""A run names no absolute path, and is resumed from any folder, after a move, without its text."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minillm import errors
from minillm.checkpoint.find import open_checkpoint
from minillm.checkpoint.run_folder import RunFolder
from minillm.config.config_files import read_config
from minillm.runtime import device, files, program, relative_paths
from minillm.scripts import train as train_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def known_peak(monkeypatch) -> None:
    """The machine's peak takes a while to be timed."""
    monkeypatch.setattr(device, "measured_peak_flops", lambda device, dtype: 1e10)


@pytest.fixture
def project(tmp_path, text_file) -> Path:
    """A folder with a text; what is trained in it is kept below it."""
    root = tmp_path / "project"
    root.mkdir()
    shutil.copy(text_file, root / "words.txt")
    return root


def begin(train, project: Path, *flags: str | Path) -> Path:
    run = project / "runs" / "first"
    words = ["--out", run, "--cache-dir", project / "data" / "prepared", *flags]
    assert train("--data", project / "words.txt", *words, "--save-every", "4") == 0
    return run


def test_no_file_of_a_run_holds_an_absolute_path(train, project, tiny_run, tmp_path, monkeypatch):
    """Neither of the text nor of the run, the cache, the tokenizer, the run that it began with."""
    base = shutil.copytree(tiny_run, project / "base")
    first = begin(train, project, "--init-from", base)
    second, third = project / "runs" / "second", project / "runs" / "third"
    shutil.copy(base / "tokenizer.json", project / "own.json")
    flags = ["--cache-dir", project / "cache", "--tokenizer", project / "own.json"]
    assert train("--data", project / "*.txt", "--out", second, *flags) == 0
    shutil.rmtree(project / "cache")
    assert train("--resume", second, "--data", project / "words.txt", "--steps", "9") == 0
    monkeypatch.chdir(project)
    assert train("--data", "words.txt", "--out", "runs/third", "--cache-dir", "cache") == 0
    assert train("--resume", "runs/third", "--steps", "9") == 0
    # Where a path has nothing in common with the run, not even the name of its home is kept.
    far = relative_paths.stated(Path("/somewhere/run"), {"data": str(project / "words.txt")})
    assert far == {"data": "words.txt"}
    hidden = [str(tmp_path), str(project), str(Path.cwd()), str(Path.home())]
    for run in (first, second, third):
        written = [path for path in run.rglob("*") if path.is_file()]
        assert len(written) > 8
        for path in written:
            data = path.read_bytes()
            assert not [text for text in hidden if text.encode() in data], path
        config = files.read_json(run / "config.json")["train"]
        assert not {"out", "overwrite"} & config.keys()
        for value in config.values():
            assert not str(value).startswith("/")


def test_a_run_is_resumed_from_any_folder(train, project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    assert train("--data", "words.txt", "--out", "runs/first", "--cache-dir", "cache") == 0
    for step, (folder, run) in enumerate(
        ((project, "runs/first"), (project / "runs", "first"), (tmp_path, "project/runs/first")), 9
    ):
        monkeypatch.chdir(folder)
        words = ["--resume", run, "--steps", str(step), "--threads", "1"]
        assert program.run("train.py", train_script.main, words) == 0
        assert open_checkpoint(Path(run)).step == step
    assert {p.name for p in project.iterdir()} == {"words.txt", "runs", "cache"}


def test_a_run_is_resumed_after_a_move(train, project, tmp_path, monkeypatch):
    """With its text; without the prepared text; without the text; alone, to a folder of the same
    project; alone: then the text is to be named."""
    run = begin(train, project)
    monkeypatch.chdir(tmp_path)

    def resumed(folder: Path, *flags: str | Path) -> int:
        words = ["--resume", folder, "--steps", str(open_checkpoint(folder).step + 1), *flags]
        return program.run("train.py", train_script.main, [*map(str, words), "--threads", "1"])

    moved = project.rename(tmp_path / "moved")
    run = moved / "runs" / "first"
    assert resumed(run) == 0
    run = run.rename(moved / "archive")  # the run alone; the key finds its text
    assert resumed(run) == 0
    shutil.rmtree(moved / "data")
    (moved / "runs").rmdir()
    (moved / "runs").mkdir()
    run = run.rename(moved / "runs" / "first")
    assert resumed(run) == 0  # prepared again
    (moved / "words.txt").rename(tmp_path / "w.txt")
    assert resumed(run) == 0  # the prepared text is enough
    shutil.rmtree(moved / "data")
    assert resumed(run) == 2
    assert resumed(run, "--data", tmp_path / "w.txt") == 0
    assert resumed(run) == 0


def test_runs_of_earlier_releases_keep_their_paths(tmp_path, monkeypatch, text_file):
    """Absolute, or seen from the folder in which the run was begun."""
    run = tmp_path / "runs" / "old"
    run.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    shutil.copy(text_file, tmp_path / "mine.txt")
    (tmp_path / "inner").mkdir()
    for path in (str(text_file), "mine.txt", "inner", "no such file", "data/prepared"):
        assert relative_paths.path_found(run, path) == path
    monkeypatch.chdir(tmp_path / "inner")
    assert relative_paths.path_found(run, "../mine.txt") == "../mine.txt"
    first = Path(__file__).resolve().parents[1] / "golden" / "f537e8f"
    stated = files.read_json(first / "plain" / "config.json")["corpus"]
    assert Path(stated).is_absolute() and RunFolder(first / "plain").corpus_places()[0] == Path(
        stated
    )


def test_paths_there_and_back(tmp_path):
    run = tmp_path / "a" / "run"
    run.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "x.txt").touch()
    settings = {"data": str(tmp_path / "x.txt"), "init_from": None, "tokenizer": "bpe", "steps": 5}
    for place in (run, tmp_path / "link" / "run"):
        written = relative_paths.stated(place, {**settings, "out": "o", "overwrite": True})
        assert written == {**settings, "data": "../../x.txt"}
        assert relative_paths.found(place, written) == settings
    several = {"data": [str(tmp_path / "x.txt"), str(tmp_path / "*.txt")]}
    assert relative_paths.stated(run, several) == {"data": ["../../x.txt", "../../*.txt"]}
    assert relative_paths.found(run, relative_paths.stated(run, several)) == several
    assert relative_paths.same(str(tmp_path / "x.txt"), str(tmp_path / "a" / ".." / "x.txt"))


TOLD_ASCII = """
import sys
from pathlib import Path
from minillm.runtime import relative_paths
from minillm.flags import train
run = Path(sys.argv[1])
text = relative_paths.found(run, {"data": "../t\\u00e9xt.txt"})["data"]
assert Path(text).read_bytes() == b"here"
assert relative_paths.stated(run, {"data": text}) == {"data": "../t\\u00e9xt.txt"}
train.parse(["--config", str(run / "config.toml")])
"""


def test_paths_in_files_are_found_where_python_is_told_ascii(tmp_path):
    """In a run's files and in a file for --config, which are UTF-8 under any locale."""
    run, text = tmp_path / "r\u00e9", tmp_path / "t\u00e9xt.txt"
    run.mkdir()
    text.write_bytes(b"here")
    (run / "config.toml").write_text(f"data = '{text}'", encoding="utf-8")
    told = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", TOLD_ASCII, run],
        cwd=ROOT, capture_output=True, timeout=300, env={**os.environ, **told},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_utf8_is_taken_from_a_config_file(tmp_path):
    """As --print-config prints it; half a character of another kind is in no file's name."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"data": "caf\udce9.txt"}), encoding="ascii")
    assert read_config(file)["data"] == "caf\udce9.txt"
    for bad in ({"data": "caf\ud800"}, {"data": "a\0b"}, {"sample_prompt": "caf\udce9"}):
        file.write_text(json.dumps(bad), encoding="ascii")
        with pytest.raises(errors.UsageError, match="NUL or half a character"):
            read_config(file)
