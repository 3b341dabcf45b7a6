"""What save refuses, what its files are, and what tidy makes of leftovers."""

import errno
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load, load_file

from minillm.checkpoint.find import open_checkpoint
from minillm.checkpoint.run_folder import RunFolder
from minillm.checkpoint.sharded_safetensors import DTYPES, file_bytes, read_header
from minillm.checkpoint.write import save, tidy
from minillm.errors import DivergedError, UnavailableError
from minillm.runtime.files import bytes_digest, write_whole
from tests.support.thread_ranks import together, well

TENSORS = {"model": {"w": torch.arange(6.0)}, "optimizer": {"exp_avg.w": torch.ones(6)}}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with checkpoint 1."""
    (tmp_path / "config.json").touch()
    save(tmp_path, 1, TENSORS, {})
    return tmp_path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_files_are_what_safetensors_reads(tmp_path):
    """Every dtype and shape; views and parameters too."""
    parameter = torch.nn.Parameter(torch.randn(5, 3))
    given = {str(dtype): (torch.arange(7) % 2).to(dtype) for dtype in DTYPES.values()}
    given |= {
        "number": torch.tensor(2.5), "none": torch.zeros(0, 4), "turned": parameter.t(),
        "part": parameter[1:, 1], "caf\u00e9 \"[0:1": parameter, "one": torch.ones(1),
    }  # fmt: skip
    path = tmp_path / "x.safetensors"
    written = write_whole(path, file_bytes(given))
    data = path.read_bytes()
    assert written == {"bytes": len(data), "sha256": bytes_digest(data)}
    for found in (load_file(path), load(data)):
        assert found.keys() == given.keys()
        for name, t in given.items():
            assert found[name].dtype == t.dtype and found[name].shape == t.shape
            assert torch.equal(found[name], t.detach())
    for _, part in read_header(path):  # each begins where its elements may be read in place
        assert part.offset % part.dtype.itemsize == 0
    assert load(b"".join(file_bytes({}))) == {}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["model", "ema"])
def test_what_is_not_finite_is_never_written(run, kind, bad):
    tensors = {**TENSORS, "ema": {"w": torch.ones(6)}}
    tensors = {**tensors, kind: {"v": torch.ones(3), "w": torch.tensor([1.0, bad, 2.0])}}
    message = f"w of the {kind} is not finite; no checkpoint is written"
    with pytest.raises(DivergedError, match=message):
        save(run, 2, tensors, {})
    shared = {**TENSORS, "ema": TENSORS["model"]}
    raised = together(2, lambda ranks: save(run, 2, (shared, tensors)[ranks.rank], {}, ranks))
    assert [(type(e), str(e)) for e in raised] == [(DivergedError, message)] * 2
    assert names(run) == ["step-00000001"] and open_checkpoint(run).step == 1


def test_large_but_finite_weights_and_any_moments_are_written(run):
    """Their sum overflows; of the optimiser a moment may."""
    large = {t: torch.full((8,), torch.finfo(t).max, dtype=t) for t in (torch.float32, torch.half)}
    tensors = {
        "model": {str(t): x for t, x in large.items()},
        "optimizer": {"exp_avg.w": torch.tensor([torch.inf])},
    }
    save(run, 2, tensors, {})
    for t, x in large.items():
        assert torch.equal(open_checkpoint(run).tensors("model")[str(t)], x)


class Usage(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


def test_without_room_nothing_is_begun(run, monkeypatch):
    n_bytes, before = 48, {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    for free, ranks in ((int(1.1 * n_bytes), 1), (int(2 * 1.1 * n_bytes), 2)):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(1 << 40, 0, free))
            raised = together(ranks, lambda r: save(run, 2, TENSORS, {}, r))
        assert type(raised[0]) is OSError and raised[0].errno == errno.ENOSPC
        assert "too little space on the disk" in str(raised[0])
        assert all(type(e) is UnavailableError and "too little space" in str(e) for e in raised[1:])
        assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}
        with monkeypatch.context() as patch:
            enough = Usage(1 << 40, 0, free + 1)
            patch.setattr(shutil, "disk_usage", lambda path, usage=enough: usage)
            well(together(ranks, lambda r: save(run, 2, TENSORS, {}, r)))
        shutil.rmtree(run / "checkpoints" / "step-00000002")
        before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}


def leave(run: Path, name: str, damaged: str | None = None) -> None:
    """A copy of checkpoint 1 under another name, one file of it gone."""
    copy = shutil.copytree(run / "checkpoints" / "step-00000001", run / "checkpoints" / name)
    if damaged:
        (copy / damaged).unlink()


def test_tidy_deletes_leftovers(run):
    tidy(run.with_name("no such run"))
    (run / "config.json.tmp").touch()
    (run / "checkpoints.tmp" / "step-00000009").mkdir(parents=True)
    for name in (".step-00000002.tmp", ".step-00000001.gone.tmp", ".step-00000001.old.tmp"):
        leave(run, name)
    leave(run, ".step-00000003.tmp", damaged="manifest.json")
    (run / "checkpoints" / "notes").mkdir()
    tidy(run)
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.json"]
    assert names(run) == ["notes", "step-00000001"]


@pytest.mark.parametrize("damaged", ["state.json", "manifest.json", None])
def test_tidy_keeps_the_only_checkpoint(run, damaged):
    """Written whole and not named, if there is no other; one that is not whole never is."""
    leave(run, ".step-00000003.tmp", damaged)
    (run / "checkpoints" / "step-00000001").rename(run / "checkpoints" / ".step-00000001.tmp")
    state = run / "checkpoints" / ".step-00000001.tmp" / "state.json"
    tidy(run)
    # Of two that are whole the newer; here it is a copy that says it is step 1.
    assert names(run) == ["step-00000001" if damaged else "step-00000003"]
    if damaged:
        assert open_checkpoint(run).step == 1 and not state.exists()


def test_what_is_put_aside_counts_until_it_is_replaced(run):
    folder = run / "checkpoints"
    leave(run, ".step-00000001.tmp")
    (folder / "step-00000001").rename(folder / ".step-00000001.old.tmp")
    assert RunFolder(run).checkpoints() == {1: folder / ".step-00000001.old.tmp"}
    assert open_checkpoint(run).tensors("model")["w"].tolist() == [0, 1, 2, 3, 4, 5]
    tidy(run)
    assert names(run) == ["step-00000001"] and open_checkpoint(run).step == 1


def test_a_step_that_cannot_be_replaced_keeps_its_name(run, monkeypatch):
    rename, past = (
        Path.rename,
        (run / "checkpoints" / "step-00000001" / "manifest.json").read_text(),
    )

    def fail(path, target):
        if path.name == ".step-00000001.tmp":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        save(run, 1, {**TENSORS, "model": {"w": torch.zeros(6)}}, {})
    assert names(run) == ["step-00000001"]
    assert (run / "checkpoints" / "step-00000001" / "manifest.json").read_text() == past
