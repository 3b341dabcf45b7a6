"""documents.py: what is read, in which order, and what is refused."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from minillm.data import documents
from minillm.errors import CorruptError, UnavailableError, UsageError
from minillm.profiling.page import report


def texts(*paths, errors="strict"):
    return [d.text for d in documents.find([str(p) for p in paths]).documents(errors)]


def test_standard_library_is_python_in_posix_order_without_tests():
    source = documents.find(None)
    names = [path.as_posix() for path in source.files]
    assert len(names) > 200
    assert "Python 3" in source.description
    assert names == sorted(names)
    assert all(name.endswith(".py") for name in names)
    assert any(name.endswith("/argparse.py") for name in names)
    for folder in documents.SKIPPED_FOLDERS:
        assert not any(f"/{folder}/" in name.partition("/lib/python3")[2] for name in names)


def test_a_python_without_library_source_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda name: str(tmp_path / "python.zip"))
    with pytest.raises(UsageError, match="data"):
        documents.find(None)


def test_library_files_that_are_not_utf8_are_passed_over(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "b.py").write_text("b = 1\n")
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [d.text for d in documents.find(None).documents()] == ["b = 1\n"]
    with pytest.raises(UsageError, match="offset 5"):
        texts(tmp_path)


def test_folder_order_hidden_names_and_endings(tmp_path):
    for name in ("b/x.txt", "a/z.md", "a.txt", ".hidden/x.txt", ".x.txt", "picture.png", "B.PY"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["B.PY", "a.txt", "a/z.md", "b/x.txt"]


def test_folder_passes_over_pipes_broken_links_and_linked_folders(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert texts(tmp_path) == ["a"]


def test_file_of_unknown_ending_glob_and_order_given(tmp_path):
    for name in ("one.log", "two.txt", "three.txt"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "one.log") == ["one.log"]
    assert texts(tmp_path / "t*.txt") == ["three.txt", "two.txt"]
    assert texts(tmp_path / "two.txt", tmp_path, tmp_path / "one.log") == [
        "two.txt",
        "three.txt",
        "one.log",
    ]


def test_a_name_with_brackets_is_a_name_if_it_exists(tmp_path):
    (tmp_path / "a[1].txt").write_text("literal")
    (tmp_path / "a1.txt").write_text("pattern")
    assert texts(tmp_path / "a[1].txt") == ["literal"]


def test_text_is_kept_but_for_the_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\x0c\n\tend ")
    assert texts(tmp_path) == ["one\r\ntwo\rthree\x0c\n\tend "]


def test_blank_documents_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(" \n\t\r\n")
    (tmp_path / "c.txt").write_text("c")
    assert texts(tmp_path) == ["c"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_json_lines(tmp_path, name):
    rows = ["a\nb", "\u00e9\U0001f642", "x"]
    data = "\n".join(json.dumps({"text": r, "n": 1}) for r in rows) + "\n\n"
    packed = gzip.compress(data.encode()) if name.endswith("gz") else data.encode()
    (tmp_path / name).write_bytes(packed)
    source = documents.find([str(tmp_path)])
    assert [d.text for d in source.documents()] == rows
    assert [d.name.rpartition(":")[2] for d in source.documents()] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{", "rows.jsonl:2: not a JSON object"),
        (b"[1]", "rows.jsonl:2: expected"),
        (b'{"txt": "a"}', "rows.jsonl:2: expected"),
        (b'{"text": 1}', "rows.jsonl:2: expected"),
        (b"[" * 100_000, "rows.jsonl:2: not a JSON object"),
        (b'{"text": "\\ud800"}', "rows.jsonl:2: half a surrogate pair at character 0"),
        (b'{"text": "\xff"}', "rows.jsonl:2: byte 0xff at offset 10 "),
    ],
)
def test_faulty_json_line_is_named(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UsageError) as caught:
        texts(tmp_path / "rows.jsonl")
    assert message in str(caught.value)


def test_errors_replace(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9!")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x\\ud800y"}')
    assert texts(tmp_path, errors="replace") == ["caf\ufffd!", "x?y"]


def test_offset_counts_bytes_of_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\u00e9".encode() * 10 + b"\xe9")
    with pytest.raises(UsageError, match="byte 0xe9 at offset 23 is not UTF-8.*errors replace"):
        texts(tmp_path)


def test_truncated_gzip_is_corrupt(tmp_path):
    data = gzip.compress(b'{"text": "some text"}\n' * 100)
    (tmp_path / "a.jsonl.gz").write_bytes(data[:-12])
    with pytest.raises(CorruptError, match="a.jsonl.gz: damaged gzip"):
        texts(tmp_path)


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UnavailableError, match="pip install pyarrow"):
        texts(tmp_path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    assert texts(tmp_path) == ["a", "b"]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and rubbish")
    with pytest.raises(CorruptError, match="damaged parquet"):
        texts(tmp_path)


def test_a_file_that_disappears_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    source = documents.find([str(tmp_path)])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UsageError, match="a.txt: disappeared"):
        list(source.documents())


def test_documents_are_streamed(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    stream = documents.find([str(tmp_path)]).documents()
    assert next(stream).text == "a"
    with pytest.raises(UsageError):
        next(stream)


def test_a_folder_is_read_without_what_minillm_made(tiny_run, tmp_path, train, monkeypatch):
    """Runs, prepared corpora and profiles, at any depth; a file of them only if it is named."""
    text = tmp_path / "texts"
    first = Path(__file__).resolve().parents[1] / "golden" / "f537e8f"
    (text / "deep" / "er").mkdir(parents=True)
    (text / "deep" / "a.txt").write_text("a novel\n" * 200)
    (text / "report" / "more").mkdir(parents=True)
    (text / "config.json").write_text("{}")  # a user's own
    before = [path.name for path in documents.find([str(text)]).files]
    shutil.copytree(tiny_run, text / "run")
    shutil.copytree(first / "plain", text / "deep" / "er" / "run")
    shutil.copytree(first / "corpus", text / "deep" / "corpus")
    report.write(text / "deep" / "profile", {"device": "x"}, {"model": []})
    for name in ("run/notes.txt", "deep/corpus/notes.md"):
        (text / name).write_text("of ours")
    assert [path.name for path in documents.find([str(text)]).files] == before == ["a.txt"]
    assert documents.find([str(text / "**" / "*.txt")]).files == (text / "deep" / "a.txt",)
    for words in ([text / "run" / "samples.txt"], [text / "r*" / "samples.txt"]):
        assert documents.find([*map(str, words)]).files == (text / "run" / "samples.txt",)
    with pytest.raises(
        UsageError, match="the 2 files that match are minillm's own, in a run; name"
    ):
        documents.find([str(text / "run" / "**" / "*.txt"), str(text / "deep")])
    for ours, what in (("run", "a run"), ("deep/profile", "a profile")):
        with pytest.raises(UsageError, match=f"{what} of minillm, not text; name the files"):
            documents.find([str(text / ours)])

    # Twice in the folder of the texts: the second training reads what the first did.
    shutil.rmtree(text / "run")
    monkeypatch.chdir(text)
    for _ in range(2):
        assert train("--data", ".", "--cache-dir", "data/prepared", "--steps", "1") == 0
    assert len(list(Path("data/prepared").iterdir())) == 1
    assert sorted(path.name for path in Path("runs").iterdir()) == ["nano-1", "nano-2"]
