"""--data, --val, --text-column, --encoding: on the command line, in files, and on --resume."""

import json
from pathlib import Path

import pytest

from minillm.checkpoint.run_folder import RunFolder
from minillm.commands import prepare as command
from minillm.config import resolve as configure
from minillm.config.train import TrainConfig
from minillm.data.shards import open_corpus
from minillm.errors import UsageError
from minillm.runtime import program
from minillm.scripts import train as script
from tests.support.refusals import refusal


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three files of text, one of rows and one in the encoding of Windows."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "v"):
        Path(f"{name}.txt").write_text(f"the {name} of a text\n" * 60)
    Path("rows.json").write_text(json.dumps([{"body": f"row {n} of some text\n" * 30}
                                             for n in range(4)]))  # fmt: skip
    Path("windows.txt").write_bytes("\u201cquoted\u201d text\n".encode("cp1252") * 60)
    return tmp_path


def corpus_of(run: Path):
    return open_corpus(RunFolder(run).corpus())


def test_several_paths_and_validation_text_train_and_resume(place, train, capfd):
    flags = ["--data", "a.txt", "b.txt", "--val", "v.txt", "b.txt", "--steps", "2"]
    assert train(*flags, "--cache-dir", "p", "--out", "r") == 0
    said = capfd.readouterr().err
    assert "text      held out 1,920 of 2,880 bytes (66.7%): v.txt and b.txt" in said
    assert "1 of the documents to train on is validation text too and is left out" in said
    corpus = corpus_of(Path("r"))
    assert corpus.documents == {"train": 1, "val": 2}
    config = json.loads(Path("r/config.json").read_text())["train"]
    assert config["data"] == ["../a.txt", "../b.txt"]  # as seen from the run
    assert config["val"] == ["../v.txt", "../b.txt"]
    # The text can be prepared again, and may have moved.
    for file in corpus.folder.iterdir():
        file.unlink()
    corpus.folder.rmdir()
    Path("v.txt").rename("w.txt")
    assert train("--resume", "r", "--steps", "3") == 2
    assert "say where with --data and --val" in capfd.readouterr().err
    assert train("--resume", "r", "--steps", "3", "--val", "w.txt", "b.txt") == 0
    assert corpus_of(Path("r")).key == corpus.key
    corpus.folder.rename("elsewhere")
    assert train("--resume", "r", "--steps", "4", "--data", "elsewhere") == 0
    assert train("--resume", "r", "--steps", "5", "--data", "a.txt", "b.txt", "--val", "a.txt") == 2


def test_column_and_encoding_train(place, train, capfd):
    flags = ["--cache-dir", "p", "--steps", "1"]
    assert train("--data", "rows.json", "--text-column", "body", *flags, "--out", "r") == 0
    assert sum(corpus_of(Path("r")).bytes.values()) == 4 * 30 * len("row 0 of some text\n")
    assert train("--data", "windows.txt", *flags, "--out", "s") == 2
    assert "byte 0x93 at offset 0 is not UTF-8; it looks like Windows text: pass --encoding " in (
        capfd.readouterr().err
    )
    assert train("--data", "windows.txt", "--encoding", "cp1252", *flags, "--out", "s") == 0
    assert sum(corpus_of(Path("s")).bytes.values()) == 60 * len(
        "\u201cquoted\u201d text\n".encode()
    )


def test_lists_of_paths_go_round_by_config_files(place, capsys):
    words = ["--data", "a.txt", "b.txt", "--val", "v.txt", "--encoding", "cp1252"]
    assert program.run("train.py", script.main, [*words, "--print-config"]) == 0
    Path("c.json").write_text(capsys.readouterr().out)
    settings = configure.resolve({}, "c.json", None)
    assert settings.train.data == ("a.txt", "b.txt") and settings.train.val == "v.txt"
    assert settings.train.encoding == "cp1252"
    assert program.run("train.py", script.main, ["--config", "c.json", "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("c.json").read_text())
    Path("c.toml").write_text('data = ["a.txt"]\nval = ["v.txt", "b.txt"]\n')
    train = configure.resolve({}, "c.toml", None).train
    assert train.data == "a.txt" and train.val == ("v.txt", "b.txt")
    assert TrainConfig(data=["a.txt", "b.txt"]).data == ("a.txt", "b.txt")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data", "a.txt", ""], "--data is empty"),
        (["--data", "a.txt", "no.txt"], "no.txt: no such file or folder"),
        (["--val", ""], "--val is empty"),
        (["--val", "no.txt", "--data", "a.txt"], "no.txt: no such file or folder"),
        (["--data", "a.txt", "--val", "a.txt"], "nothing is left to train on"),
        (["--data", "prepared", "a.txt"], "prepared is prepared already and cannot be joined"),
        (["--data", "prepared", "--val", "a.txt"], "--val: prepared is prepared already"),
        (["--data", "a.txt", "--val", "prepared"], "--val prepared is prepared already"),
        (["--data", "prepared", "--encoding", "cp1252"], "--encoding: prepared is prepared"),
        (["--data", "a.txt", "--encoding", "klingon"], "--encoding klingon: no such encoding"),
        (["--data", "rows.json"], 'under "text"; it has body: name one with --text-column'),
        (["--data", "a.txt", "--text-column", ""], "--text-column is empty"),
        (["--data", "one.txt", "--early-stop", "2", "--tokenizer", "char"], "has 1 tokens"),
    ],
)
def test_paths_that_do_not_fit_are_refused(place, capfd, words, message):
    Path("one.txt").write_text("abcdefghijklmnopqrst")
    argv = ["a.txt", "b.txt", "--out", "prepared", "--tokenizer", "byte"]
    assert program.run("minillm prepare", command.main, argv) == 0
    small = ["--threads", "1", "--n-layer", "1", "--seq-len", "4"]
    assert message in refusal("train.py", [*words, *small], 2, capfd).replace("\n", " ")


@pytest.mark.parametrize("content", ['{"data": ["a.txt", 3]}', '{"data": []}', '{"val": [[]]}'])
def test_faulty_lists_in_a_config_file_are_named(place, content):
    Path("c.json").write_text(content)
    with pytest.raises(UsageError, match=r"c\.json: (data|val) = "):
        configure.resolve({}, "c.json", None)


def test_the_command_takes_the_same_flags(place, capfd):
    argv = ["a.txt", "rows.json", "--val", "v.txt", "--text-column", "body", "--tokenizer", "byte"]
    assert program.run("minillm prepare", command.main, [*argv, "--out", "c"]) == 0
    assert open_corpus("c").documents == {"train": 5, "val": 1}
    argv = ["windows.txt", "--encoding", "cp1252", "--out", "d"]
    assert program.run("minillm prepare", command.main, argv) == 0


def test_what_a_folder_passes_over_is_said_at_the_start(place, train, capfd):
    Path("table.csv").write_text("1,2\n")
    Path("windows.txt").unlink()
    flags = ["--cache-dir", "p", "--steps", "1"]
    assert train("--data", ".", *flags, "--out", "r") == 0
    assert "text      skipped 2 files (1 .csv, 1 .json)\n" in capfd.readouterr().err


def test_a_table_is_said_to_be_read_as_plain_text(place, train, capfd):
    Path("table.csv").write_text("1,2\n" * 200)
    Path("other.tsv").write_text("3\t4\n" * 200)
    flags = ["--cache-dir", "p", "--steps", "1", "--data"]
    assert train(*flags, "table.csv") == train(*flags, "table.csv", "--val", "other.tsv") == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "plain text" in line]
    rest = "read as plain text; rows are read from .jsonl, .json and .parquet"
    assert said == [f"text      table.csv is {rest}", f"text      2 tables are {rest}"]
    assert train(*flags, "a.txt") == 0 and "plain text" not in capfd.readouterr().err
