"""A damaged checkpoint: the newest good one is taken in its place, and it is said."""

import errno
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from minillm.checkpoint import find as checkpoint, read as reading
from minillm.checkpoint.find import load_run, open_checkpoint
from minillm.checkpoint.run_folder import RunFolder, newest_run, run_of_launch
from minillm.checkpoint.write import save, set_aside
from minillm.errors import CorruptError
from minillm.runtime import files as storage, program
from minillm.scripts import sample
from tests.support.damaging import cut, flip, reseal, rewrite
from tests.support.thread_ranks import together, well

FILES = ["model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors",
         "ema-00001-of-00001.safetensors", "state.json", "manifest.json"]  # fmt: skip
LAST, OLDER = "checkpoints/step-00000008", "checkpoints/step-00000004"


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """A finished run to damage, with checkpoints 4 and 8."""
    return shutil.copytree(tiny_run, tmp_path / "run")


def unreadable(monkeypatch, path: Path, error: int) -> None:
    """Reading this one file fails as the system says that it does."""
    real_digest, real_read = storage.file_digest, Path.read_bytes

    def fail(real, asked):
        if asked == path:
            raise OSError(error, errno.errorcode[error], str(path))
        return real(asked)

    monkeypatch.setattr(reading, "file_digest", lambda p: fail(real_digest, p))
    monkeypatch.setattr(Path, "read_bytes", lambda p: fail(real_read, p))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, "EIO"])
def test_the_newest_good_one_is_taken(run, monkeypatch, name, damage):
    path, said = run / LAST / name, []
    before = load_file(run / OLDER / FILES[0])
    damage(path) if damage != "EIO" else unreadable(monkeypatch, path, errno.EIO)
    found = open_checkpoint(run, say=said.append)
    assert found.step == 4
    assert found.tensors("model").keys() == before.keys()
    assert all((t == before[name]).all() for name, t in found.tensors("model").items())
    (line,) = said
    assert line.startswith(f"warning: {path}: ") and line.endswith("; going on from step 4")


def test_what_may_pass_is_no_damage(run, monkeypatch):
    """Of a file that this user may not read, or while files are short, nothing is known."""
    for code in (errno.EACCES, errno.EMFILE):
        with monkeypatch.context() as patch:
            unreadable(patch, run / LAST / FILES[0], code)
            with pytest.raises(OSError, match=errno.errorcode[code]):
                open_checkpoint(run)


def test_several_damaged_ones_are_all_named(run, capsys):
    for step in (12, 16):
        shutil.copytree(run / LAST, run / "checkpoints" / f"step-{step:08d}")
    flip(run / LAST / "state.json")
    assert open_checkpoint(run).step == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.endswith("; going on from step 4") for line in lines)
    for line, step in zip(lines, (16, 12, 8), strict=True):
        assert f"step-{step:08d}" in line


def test_none_is_good(run):
    flip(run / OLDER / FILES[2])
    (run / LAST / "manifest.json").unlink()
    words = "step-00000008/manifest.json: is missing.*; no other checkpoint of the run is good"
    with pytest.raises(CorruptError, match=words):
        open_checkpoint(run)
    with pytest.raises(CorruptError, match="checkpoint 4 is refused; no other is good"):
        open_checkpoint(run, "4")
    assert program.run("sample.py", sample.main, [str(run)]) == 3


def test_one_that_was_asked_for_is_no_others_place(run):
    cut(run / LAST / FILES[2])
    with pytest.raises(CorruptError, match="ema-.*; checkpoint 8 is refused; good: 4"):
        open_checkpoint(run, "8")
    state = run / LAST / "state.json"
    rewrite(state, {"progress.best_step": 8})
    with pytest.raises(CorruptError, match="; checkpoint best is refused; good: 4"):
        open_checkpoint(run, "best")
    flip(state)  # which says what the best one is
    with pytest.raises(CorruptError, match="state.json: .*; checkpoint best is refused; good: 4"):
        open_checkpoint(run, "best")
    assert open_checkpoint(run, "4").step == 4


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_take_the_same(run, capsys, name, size):
    """Each hashes its share of the files, so one alone sees the damage."""
    flip(run / LAST / name)
    found = well(together(size, lambda ranks: open_checkpoint(run, ranks=ranks)))
    assert [each.step for each in found] == [4] * size
    (line,) = capsys.readouterr().err.splitlines()  # rank 0 speaks for all
    assert name in line
    raised = together(size, lambda ranks: open_checkpoint(run, "8", ranks))
    assert {type(e) for e in raised} == {CorruptError} and len({str(e) for e in raised}) == 1
    assert name in str(raised[0]) and str(raised[0]).endswith("good: 4")


def test_a_medium_that_fails_one_rank_alone(run, monkeypatch):
    real = storage.file_digest

    def digest(path):
        if path == run / LAST / FILES[1]:
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(reading, "file_digest", digest)
    found = well(together(3, lambda ranks: open_checkpoint(run, ranks=ranks)))
    assert [each.step for each in found] == [4, 4, 4]


def test_whoever_looks_at_the_newest_one(run, tmp_path, monkeypatch):
    rewrite(run / LAST / "state.json", {"settings.steps": 9})
    reseal(run / LAST)
    assert RunFolder(run).newest_settings()["steps"] == 9
    flip(run / LAST / "state.json")
    assert RunFolder(run).newest_settings()["steps"] == 8
    (run / OLDER / "state.json").unlink()
    assert RunFolder(run).newest_settings() == {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    mine = run.rename("runs/mine")
    rewrite(mine / "config.json", {"launch": "x"})
    shutil.copytree(mine, "runs/a damaged one")
    flip(Path("runs/a damaged one/config.json"))
    (mine / LAST / "manifest.json").unlink()
    assert run_of_launch("x", None).path == Path("runs/mine")
    flip(mine / "config.json")
    assert run_of_launch("x", None) is None and run_of_launch("x", str(mine)) is None
    assert newest_run().path.parent == Path("runs")


def test_sample_goes_on_and_says_from_where(run, capsys):
    flip(run / LAST / FILES[2])
    assert program.run("sample.py", sample.main, [str(run), "--max-tokens", "3"]) == 0
    first, second, _ = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: ") and first.endswith("going on from step 4")
    assert ", step 4, " in second
    older, _, _ = load_run(run)
    asked, _, _ = load_run(run, checkpoint="4")
    assert (older.head.weight == asked.head.weight).all()


def test_training_goes_on_as_if_it_had_ended_there(run, tiny_run, train, capsys):
    """From 4 to 8 again: the same bits; the damaged one is out of the way, not gone."""
    flip(run / LAST / FILES[1])
    assert train("--resume", run) == 0
    assert "going on from step 4" in capsys.readouterr().err
    assert (run / "checkpoints" / "damaged-step-00000008" / FILES[1]).is_file()
    for name in FILES[:3]:
        assert (run / LAST / name).read_bytes() == (tiny_run / LAST / name).read_bytes()
    assert open_checkpoint(run, say=pytest.fail).step == 8


def test_what_was_passed_over_costs_no_good_one(run, train):
    """Counted among those to keep, the damaged step 8 would have left nothing else."""
    flip(run / LAST / FILES[0])
    assert train("--resume", run, "--steps", "6", "--keep-last", "1", "--no-keep-best") == 0
    assert sorted(RunFolder(run).step_folders()) == [6]
    assert open_checkpoint(run, say=pytest.fail).step == 6


def test_settings_are_those_of_the_checkpoint_that_is_taken(run, train, capsys):
    """Step 12 was on its way to 20; step 8 is on its way to 12, as it is said when it goes on."""
    assert train("--resume", run, "--steps", "12", "--keep-last", "9") == 0
    rewrite(run / "checkpoints" / "step-00000012" / "state.json", {"settings.steps": 20})
    flip(run / "checkpoints" / "step-00000012" / FILES[0])
    capsys.readouterr()
    assert train("--resume", run) == 0
    assert "going on from step 8" in capsys.readouterr().err
    state = open_checkpoint(run).state
    assert state["step"] == 12 and state["settings"]["steps"] == 12
    assert state["settings"]["keep_last"] == 9


def test_the_configuration_of_another_run(run, train, capsys):
    """The same names and shapes, another model: as many heads, of the same width, were swapped."""
    config = storage.read_json(run / "config.json")["model"]
    assert (config["n_head"], config["rope_base"]) == (2, 10000.0)
    for changes, words in (
        ({"model.n_head": 1, "model.n_kv_head": 1, "model.d_head": 16}, "n_head 1, step 8 was"),
        ({"model.rope_base": 500.0}, "rope_base 500.0, step 8 was trained with 10000.0"),
    ):
        other = shutil.copytree(run, run.with_name("other"))
        rewrite(other / "config.json", changes)
        with pytest.raises(CorruptError, match=f"other/config.json: states {words}"):
            load_run(other)
        assert train("--resume", other, "--steps", "9") == 3
        assert f"config.json: states {words}" in capsys.readouterr().err
        shutil.rmtree(other)


def test_setting_aside(tmp_path):
    (tmp_path / "config.json").touch()
    for step in (1, 2, 3):
        save(tmp_path, step, {}, {})
    folder = tmp_path / "checkpoints"
    assert set_aside(tmp_path, 3) == []
    assert set_aside(tmp_path, 1) == [folder / f"damaged-step-0000000{n}" for n in (2, 3)]
    save(tmp_path, 2, {}, {"again": 1})
    assert set_aside(tmp_path, 1) == [folder / "damaged-step-00000002"]  # in the first one's place
    assert storage.read_json(folder / "damaged-step-00000002" / "state.json")["again"] == 1
    assert checkpoint.open_checkpoint(tmp_path).step == 1


STATES = {
    "a step of text": {"step": "8"},
    "no step": {"step": ...},
    "another step": {"step": 7},
    "another progress": {"progress.step": 7},
    "a progress of text": {"progress.tokens": "many"},
    "a negative time": {"progress.trained_s": -1},
    "no progress": {"progress": []},
    "a best step of text": {"progress.best_step": "4"},
    "a pace that goes back": {"pace": [[0, 0.0], [0, 1.0]]},
    "a pace of numbers": {"pace": [1, 2]},
    "settings of nothing": {"settings": None},
    "an unknown dtype": {"fixed.dtype": "fp12"},
    "a micro-batch of nothing": {"fixed.micro_batch_size": 0},
    "threads without end": {"fixed.threads": 10**9},
    "a scale of nothing": {"scale": {"value": 0}},
    "shapes of text": {"shapes": {"norm.weight": "16"}},
}


@pytest.mark.parametrize("changes", STATES.values(), ids=STATES)
def test_a_state_that_is_whole_and_cannot_be(run, train, changes, capsys):
    rewrite(run / LAST / "state.json", changes)
    reseal(run / LAST)
    with pytest.raises(CorruptError, match="step-00000008"):
        open_checkpoint(run, "8")
    assert open_checkpoint(run).step == 4
    assert capsys.readouterr().err.count("\n") == 1


LACKING = [{"progress.step": ...},
           {"progress.tokens": ...}, {"pace": ...}, {"fixed.dtype": ...}, {"settings": ...},
           {"progress.more": 1}, {"scale": {"more": 1}}, {"settings.seed": 1},
           {"settings.steps": "9"}, {"settings.steps": True}]  # fmt: skip


@pytest.mark.parametrize("changes", LACKING, ids=str)
def test_a_state_that_training_cannot_go_on_from(run, train, changes, capsys):
    """Sampling needs none of it."""
    rewrite(run / LAST / "state.json", changes)
    reseal(run / LAST)
    assert train("--resume", run, "--threads", "1") == 3
    line = capsys.readouterr().err
    assert line.startswith("train.py: error: ") and line.count("\n") == 1 and str(run) in line
    assert open_checkpoint(run, say=pytest.fail).step == 8


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_failing_medium_without_a_way_out(run, monkeypatch, capsys, name):
    """The system does not say which file it is, when one that is open cannot be read."""
    real = Path.read_bytes

    def fail(path):
        if path == run / name:
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert program.run("sample.py", sample.main, [str(run)]) == 5
    assert capsys.readouterr().err == f"sample.py: error: {run / name}: Input/output error\n"
