"""No command deletes or overwrites a file that it did not make, whatever the flags."""

import json
import shutil
from pathlib import Path

import pytest

from minillm.checkpoint import placing
from minillm.checkpoint.find import open_checkpoint
from minillm.checkpoint.run_folder import RunFolder, newest_run
from minillm.checkpoint.write import prune, save, set_aside, tidy
from minillm.commands import prepare, profile
from minillm.data.shards import is_prepared
from minillm.errors import UsageError
from minillm.profiling.page import report
from minillm.runtime import program
from minillm.runtime.files import building, read_json, write_json
from minillm.runtime.ownership import CORPUS, RUN, claims, is_run, product
from minillm.scripts import sample

OUR_NAMES = (
    "config.json", "tokenizer.json", "tokenizer.model", "metrics.jsonl", "samples.txt",
    "bad-steps.jsonl", "lock", "index.json", "results.json", "index.html", "kernels.csv",
    "config.json.tmp", "metrics.jsonl.tmp", "train-00000.bin",
)  # fmt: skip


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """All that is in a folder: the bytes of files, the targets of links, None for folders."""
    return {
        path.relative_to(folder).as_posix(): (
            str(path.readlink()) if path.is_symlink()
            else path.read_bytes() if path.is_file() else None
        )
        for path in folder.rglob("*")
    }  # fmt: skip


def unchanged(before: dict, folder: Path) -> bool:
    """Whether all that was in the folder is still there, byte by byte."""
    return before.items() <= tree(folder).items()


@pytest.fixture
def project(tmp_path) -> Path:
    """Folders of a user: each has files of a kind that minillm gives the same names to."""
    root = tmp_path / "project"
    contents = {
        "thesis": {"thesis.tex": "x", "config.json": "{}"},
        "model": {"config.json": '{"model_type": "gpt2", "version": "1"}', "model.safetensors": "x",
                  "tokenizer.json": "{}"},
        "site": {"index.json": '{"pages": []}', "index.html": "<p>", "about.txt": "a text " * 99},
        "lock only": {"lock": "mine"},
        "half a run": {"lock": "", "tokenizer.json": "{}"},
        "tokens": {"tokenizer.json": "{}", "tokenizer.model": "x"},
        "other trainer": {"config.json": '{"model": {}, "train": {}, "version": 1}',
                          "checkpoints/step-1/model.pt": "x", "checkpoints/notes.txt": "x"},
        "broken": {"config.json": "{", "checkpoints/last.ckpt": "x"},
        "results": {"results.json": '{"results": [1]}', "kernels.csv": "a,b"},
        **{f"only {name}": {name: "mine"} for name in OUR_NAMES},
    }  # fmt: skip
    for folder, files in contents.items():
        for name, text in files.items():
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return root


def test_folders_of_others_are_never_written_to(project, train, monkeypatch, capsys, text_file):
    """With and without --overwrite, as the output of every command that has one."""
    before, home = tree(project), project.parent
    for folder in sorted(project.iterdir()):
        assert not is_run(folder) and product(folder) is None, folder
        for flags in ([], ["--overwrite"]):
            assert train("--out", folder, *flags) == 2, folder
            said = capsys.readouterr().err
            assert "name another folder" in said and "--overwrite" not in said, folder
        monkeypatch.chdir(folder)
        assert train("--out", ".", "--overwrite") == 2
        monkeypatch.chdir(home)
        words = [str(text_file), "--out", str(folder), "--tokenizer", "byte"]
        assert program.run("prepare", prepare.main, words) == 2
        words = ["--suite", "model", "--quick", "--out", str(folder), "--device", "cpu"]
        assert program.run("profile", profile.main, words) == 2
        for path in folder.iterdir():
            assert program.run("profile", profile.main, ["--trace", str(path), "--quick"]) == 2
            if path.is_file():
                assert train("--out", path, "--overwrite") == 2
    assert tree(project) == before


def test_folders_of_others_are_not_taken_for_runs(project, train, tmp_path, capsys, monkeypatch):
    before = tree(project)
    none = "is not a run of minillm: its config.json is another program's"
    none = {"model": "is a Hugging Face folder", "tokens": "it has no config.json",
            "thesis": none, "other trainer": none}  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copytree(project, tmp_path / "runs")
    with pytest.raises(UsageError, match="no run with a checkpoint"):
        newest_run(begun=True)
    assert train("--resume") == 2
    for name in none:
        capsys.readouterr()
        assert train("--resume", project / name) == 2
        assert train("--init-from", project / name) == 2
        assert program.run("sample.py", sample.main, [str(project / name)]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 3 and all(none[name] in line for line in said), said
    assert not is_prepared(project / "site")
    # A folder with an index.json of its own is text like any other.
    flags = ["--cache-dir", tmp_path / "cache", "--out", tmp_path / "new", "--steps", "1"]
    assert train("--data", project / "site", *flags) == 0
    assert unchanged(before, project)


def test_overwrite_keeps_files_that_it_did_not_make(tiny_run, train, tmp_path, capsys):
    run, elsewhere = shutil.copytree(tiny_run, tmp_path / "run"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model-00001-of-00001.safetensors").write_text("mine")
    last = run / "checkpoints" / "step-00000008"
    users = {
        run / "report.html": "mine", run / "thesis.tex": "mine", run / "notes.tmp": "mine",
        run / "texts" / "a.txt": "mine",
        run / "scratch.tmp" / "a.txt": "mine", run / "checkpoints" / "notes.txt": "mine",
        run / "checkpoints" / "step-1" / "model.pt": "mine", last / "notes.txt": "mine",
        run / "checkpoints" / ".step-00000009.tmp" / "notes.txt": "mine",
        run / "checkpoints/step-00000004/optimizer-00002-of-00002.safetensors": "mine",
    }  # fmt: skip
    for path, text in users.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (run / "checkpoints" / "step-00000002").symlink_to(elsewhere)
    (run / "link").symlink_to(elsewhere)
    kept = {name: content for name, content in tree(run).items()
            if run / name in users or name in ("link", "checkpoints/step-00000002")}  # fmt: skip
    (run / "metrics.jsonl").write_text('{"step": 99, "tokens": 1}\n')
    assert train("--out", run) == 2
    assert "or replace it with --overwrite" in capsys.readouterr().err
    assert train("--out", run, "--overwrite", "--no-keep-best") == 0
    assert {n for n, c in kept.items() if tree(run).get(n, 0) != c} == set()
    assert tree(elsewhere) == {"model-00001-of-00001.safetensors": b"mine"}
    assert '"step": 99' not in (run / "metrics.jsonl").read_text()
    assert sorted(RunFolder(run).checkpoints()) == [8]


def test_a_second_tokenizer_in_a_run_is_not_overwritten(tiny_run, train, tmp_path, capsys):
    """Such as that of a model which somebody has exported into the same folder."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "tokenizer.model").write_text("mine")
    before = tree(run)
    assert train("--out", run, "--overwrite") == 2
    assert "tokenizer.model in it is not the tokenizer" in capsys.readouterr().err
    assert tree(run) == before


def test_overwriting_a_run_leaves_nothing_of_it(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "checkpoints" / ".step-00000006.gone.tmp").mkdir()
    (run / "checkpoints" / ".step-00000006.gone.tmp" / "state.json").touch()
    shutil.copytree(run / "checkpoints/step-00000004", run / "checkpoints/damaged-step-00000007")
    (run / "samples.txt.tmp").touch()
    _, held = placing.make_run(str(run), "nano", True)
    assert tree(run) == {"lock": placing.MARK}
    assert placing.is_free(run)
    if held:
        held.close()


def test_a_run_of_the_first_format_can_be_overwritten(train, tmp_path):
    """Its lock file is empty."""
    first = Path(__file__).resolve().parents[1] / "golden" / "f537e8f" / "plain"
    run = shutil.copytree(first, tmp_path / "run")
    (run / "lock").touch()
    assert is_run(run) and train("--out", run, "--overwrite", "--steps", "1") == 0
    assert list(RunFolder(run).checkpoints()) == [1]


@pytest.mark.parametrize("flag", ["--data", "--init-from", "--tokenizer", "--config"])
def test_what_a_command_reads_is_not_overwritten(tiny_run, train, tmp_path, capsys, flag):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    inner = {"--data": "samples.txt", "--init-from": "", "--tokenizer": "tokenizer.json",
             "--config": "config.json"}[flag]  # fmt: skip
    (tmp_path / "link").symlink_to(run)
    before = tree(run)
    for path in (run / inner, tmp_path / "link" / inner):
        assert train("--out", run, "--overwrite", flag, path) == 2
        if flag != "--config":  # which may be refused for what it says
            said = capsys.readouterr().err
            assert f"--overwrite would delete {flag} {path}, which is part of --out" in said
    assert tree(run) == before


def test_a_run_with_links_in_the_place_of_its_files_is_not_overwritten(tiny_run, train, tmp_path):
    for name in ("checkpoints", "metrics.jsonl", "config.json", "tokenizer.json"):
        run = shutil.copytree(tiny_run, tmp_path / name / "run")
        (run / name).rename(tmp_path / name / "away")
        (run / name).symlink_to(tmp_path / name / "away")
        before = tree(tmp_path)
        assert train("--out", run, "--overwrite") == 2
        assert tree(tmp_path) == before


def test_damaged_runs_are_not_emptied(tiny_run, train, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    data = bytearray((run / "config.json").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "config.json").write_bytes(data)
    before = tree(run)
    assert claims(run, RUN) and not is_run(run)
    assert train("--out", run, "--overwrite") == 2
    assert "config.json is damaged or of a newer minillm" in capsys.readouterr().err
    assert tree(run) == before


def test_checkpoints_are_deleted_without_the_files_of_others(tmp_path):
    write_json(tmp_path / "config.json", {"model": {}, "train": {}, "tokenizer_sha256": ""})
    for step in (1, 2, 3):
        folder = save(tmp_path, step, {}, {})
        (folder / "notes.txt").write_text(f"of {step}")
        (folder / "more").mkdir()
    (tmp_path / "mine.tmp").write_text("mine")
    (tmp_path / "checkpoints" / ".step-x.tmp").mkdir()
    (tmp_path / "checkpoints" / ".step-x.tmp" / "a").write_text("mine")
    kept = {n: c for n, c in tree(tmp_path).items() if not n.endswith(".json")}
    prune(tmp_path, 2, None)
    tidy(tmp_path)
    assert unchanged(kept, tmp_path) and sorted(RunFolder(tmp_path).checkpoints()) == [2, 3]
    assert sorted(RunFolder(tmp_path).step_folders()) == [
        2,
        3,
    ]  # what is left of step 1 is no checkpoint
    save(tmp_path, 3, {}, {})  # replaced: the notes go along
    tidy(tmp_path)
    assert unchanged(kept, tmp_path) and open_checkpoint(tmp_path).step == 3
    for _ in range(2):
        (moved,) = set_aside(tmp_path, 2)
        assert (moved / "notes.txt").read_text() == "of 3"
        (save(tmp_path, 3, {}, {}) / "notes.txt").write_text("of 3")
    assert (tmp_path / "checkpoints/damaged-step-00000003/notes.txt").exists()


def test_a_builder_deletes_no_folder_of_others(tmp_path):
    mine = tmp_path / ".corpus.0123abcd.tmp"
    mine.mkdir()
    (mine / "index.json").write_text("mine")
    (mine / "thesis.tex").write_text("mine")
    with building(tmp_path / "corpus"):
        pass
    assert tree(mine) == {"index.json": b"mine", "thesis.tex": b"mine"}


def test_a_profile_overwrites_only_what_it_wrote(tmp_path):
    about = {"device": "x", "date": "1"}
    report.write(tmp_path, about, {"model": []})
    (tmp_path / "kernels.csv").write_text("mine")
    report.write(tmp_path, about, {"model": []})
    with pytest.raises(UsageError, match="holds a kernels.csv that minillm did not write"):
        report.write(tmp_path, about, {"kernels": []})
    assert (tmp_path / "kernels.csv").read_text() == "mine"
    assert "kernels" not in json.loads((tmp_path / "results.json").read_text())["suites"]


def test_what_is_ours_is_recognised_whole_and_damaged(tiny_run, tmp_path):
    first = Path(__file__).resolve().parents[1] / "golden" / "f537e8f"
    for folder, kind in ((tiny_run, RUN), (first / "plain", RUN), (first / "corpus", CORPUS)):
        copy = shutil.copytree(folder, tmp_path / folder.name)
        assert claims(copy, kind) and product(copy) == kind.name
        manifest = copy / kind.manifest
        data = manifest.read_bytes()
        for damaged in (b"", b"{", b"\0" * 99, data[:-9], data.replace(b'"sha256"', b'"shb256"')):
            manifest.write_bytes(damaged)
            assert claims(copy, kind) and not is_run(copy)
        manifest.unlink()
        assert not claims(copy, kind)
        manifest.mkdir()
        assert claims(copy, kind)
    assert read_json(tiny_run / "config.json").keys() >= RUN.keys - {"sha256"}
