"""Checkpoints of several ranks: saved on any number, read on any other, whole or refused."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings as limits, strategies as some
from safetensors.torch import load_file, save_file

from minillm.checkpoint import write as saving
from minillm.checkpoint.find import open_checkpoint
from minillm.checkpoint.run_folder import RunFolder
from minillm.checkpoint.sharded_safetensors import file_name, key_of
from minillm.checkpoint.write import save, sharded_tensors
from minillm.distributed.ranks import Ranks
from minillm.errors import CorruptError, UnavailableError, UsageError
from minillm.runtime import files as storage
from tests.support.thread_ranks import together, well

SHAPES = {
    "embed.weight": (13, 5), "blocks.0.w": (3, 2, 7), "blocks.0.norm": (11,), "one": (1,),
    "none": (0, 4), "scalar": (), "head.weight": (5, 13),
}  # fmt: skip
SIZES = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
STATE = {"shapes": SHAPES, "scaler": 1024.0}
SIGN = {"model": 1, "exp_avg": -1, "exp_avg_sq": 2}


def values(kind: str, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """The elements that every kind of tensor has in these tests; all are different."""
    stop = SIZES[name] if stop is None else stop
    dtype = torch.float64 if name == "one" else torch.float32
    first = 1000 * list(SHAPES).index(name)
    return (torch.arange(first + start, first + stop) * SIGN[kind]).to(dtype)


def pieces(rank: int, size: int) -> list:
    """What a rank has of one flat row of all parameters, cut into equal shares but the last."""
    each, at, found = -(-sum(SIZES.values()) // size), 0, []
    for name, count in SIZES.items():
        start, stop = max(0, rank * each - at), min(count, (rank + 1) * each - at)
        if count == rank == 0:  # a parameter of no elements is anybody's
            start = stop = 0
        if start < stop or count == rank == 0:
            state = {kind: values(kind, name, start, stop) for kind in ("exp_avg", "exp_avg_sq")}
            state["step"] = torch.tensor(7.0)
            found.append(SimpleNamespace(
                name=name, start=start, stop=stop, master=values("model", name, start, stop),
                state=state,
            ))  # fmt: skip
        at += count
    return found


def own(rank: int, size: int) -> dict:
    return sharded_tensors(pieces(rank, size), SHAPES)


def save_on(run: Path, size: int, step: int = 5, state: dict = STATE) -> list:
    return together(size, lambda r: save(run, step, own(r.rank, size), state, r))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[int, Path]:
    """Runs whose checkpoint 5 so many ranks have saved."""
    runs = {size: tmp_path_factory.mktemp(f"of{size}") for size in (1, 2, 3, 4)}
    for size, run in runs.items():
        well(save_on(run, size))
        (run / "config.json").touch()
    return runs


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_number_of_ranks_reads_what_any_other_wrote(saved, size):
    for readers in (1, 2, 3, 4, 7):

        def read(ranks):
            found = open_checkpoint(saved[size], ranks=ranks)
            for piece in pieces(ranks.rank, ranks.size):
                span = piece.name, piece.start, piece.stop
                assert torch.equal(found.piece("model", *span), piece.master), span
                for kind, x in piece.state.items():
                    y = found.piece(kind, *span).reshape(x.shape)
                    assert y.dtype == x.dtype and torch.equal(y, x), (kind, span)
                assert found.piece("momentum", *span) is None
            return found.state["scaler"]

        assert well(together(readers, read)) == [1024.0] * readers

    found = open_checkpoint(saved[size])
    assert found.kinds == {"model", "optimizer"} and found.names("model") == sorted(SHAPES)
    model, optimizer = found.tensors("model"), found.tensors("optimizer")
    assert model.keys() == set(SHAPES) and len(optimizer) == 3 * len(SHAPES)
    for name, shape in SHAPES.items():
        assert torch.equal(model[name], values("model", name).view(shape))
        assert torch.equal(optimizer[f"exp_avg.{name}"], values("exp_avg", name).view(shape))
        assert optimizer[f"step.{name}"].shape == () and optimizer[f"step.{name}"] == 7
    found.check_fit("model", model)
    with pytest.raises(CorruptError, match=r"head.weight is torch.float32 \[5, 13\], expected"):
        found.check_fit("model", {**model, "head.weight": model["embed.weight"]})


@limits(max_examples=100)
@given(data=some.data())
def test_any_elements_of_any_tensor(saved, data):
    found = open_checkpoint(saved[data.draw(some.sampled_from((1, 2, 3, 4)))])
    name, kind = data.draw(some.sampled_from(list(SHAPES))), data.draw(some.sampled_from([*SIGN]))
    start = data.draw(some.integers(0, SIZES[name]))
    stop = data.draw(some.integers(start, SIZES[name]))
    where, key = ("model", name) if kind == "model" else ("optimizer", f"{kind}.{name}")
    assert torch.equal(found.read(where, key, start, stop), values(kind, name, start, stop))


def test_each_rank_writes_its_own_and_nothing_else(saved):
    for size, run in saved.items():
        folder = run / "checkpoints" / "step-00000005"
        names = [file_name(kind, r, size) for kind in ("model", "optimizer") for r in range(size)]
        assert sorted(p.name for p in folder.iterdir()) == sorted(
            [*names, "manifest.json", "state.json"]
        )
        for rank in range(size):
            held = load_file(folder / file_name("model", rank, size))
            assert held.keys() == own(rank, size)["model"].keys()
            if size == 1:  # as it always was: whole tensors by name
                assert {n: tuple(t.shape) for n, t in held.items()} == SHAPES
    assert key_of("blocks.0.w", 0, 28) in open_checkpoint(saved[2]).keys("model")


def reseal(folder: Path) -> None:
    """Make the manifest agree with what the files of a checkpoint are now."""
    names = [p for p in sorted(folder.iterdir()) if p.name != "manifest.json"]
    files = {p.name: {"bytes": p.stat().st_size, "sha256": storage.file_digest(p)} for p in names}
    storage.write_json(folder / "manifest.json", {"files": files})


def edit(path: Path, change) -> None:
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data) or data)


def without(path: Path, *names: str) -> None:
    held = load_file(path)
    save_file({n: t for n, t in held.items() if n not in names}, path, {"format": "pt"})


def flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


def state_says(folder: Path, **more) -> None:
    state = storage.read_json(folder / "state.json")
    storage.write_json(folder / "state.json", {**state, **more})


FIRST, SECOND = (file_name("model", rank, 2) for rank in (0, 1))
# What happens to the folder; whether the manifest is made to agree; what is said of it.
DAMAGE = {
    "cut": (lambda f: edit(f / SECOND, lambda d: d[:-4]), False, "bytes long"),
    "flipped": (lambda f: edit(f / SECOND, flip), False, "its SHA-256 is not"),
    "gone": (lambda f: (f / FIRST).unlink(), False, "is missing"),
    "gone, and the manifest knows": (lambda f: (f / SECOND).unlink(), True, "was expected"),
    "one more": (
        lambda f: shutil.copy(f / FIRST, f / file_name("ema", 0, 1)), False, "not in the manifest",
    ),
    "of three": (
        lambda f: shutil.copy(f / FIRST, f / file_name("model", 2, 3)), True, "was expected",
    ),
    "of three, one of two": (
        lambda f: (f / SECOND).rename(f / file_name("model", 2, 3)), True, "was expected",
    ),
    "a gap": (lambda f: without(f / FIRST, "blocks.0.w[0:28]"), True, "no file has element 0 of"),
    "a tensor less": (lambda f: without(f / SECOND, "head.weight"), True, "lacks head.weight"),
    "a header of any length": (
        lambda f: edit(f / FIRST, lambda d: b"\xff" * 8 + d[8:]), True, "bytes of header",
    ),
    "an unknown dtype": (
        lambda f: edit(f / FIRST, lambda d: d.replace(b'"F32"', b'"F31"')), True, "unknown dtype",
    ),
    "another shape": (
        lambda f: state_says(f, shapes={**SHAPES, "blocks.0.w": [3, 2, 8]}), True, "element 42 of",
    ),
    "another shape of a whole one": (
        lambda f: state_says(f, shapes={**SHAPES, "blocks.0.norm": [12]}), True, "expected",
    ),
    "no shapes": (lambda f: state_says(f, shapes={}), True, "shape is not known"),
}  # fmt: skip


@pytest.mark.parametrize("damage, sealed, message", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused_alike_by_all_ranks(saved, tmp_path, damage, sealed, message):
    run = shutil.copytree(saved[2], tmp_path / "run")
    folder = run / "checkpoints" / "step-00000005"
    damage(folder)
    if sealed:
        reseal(folder)
    model = {name: values("model", name).view(shape) for name, shape in SHAPES.items()}

    def read(ranks: Ranks):
        open_checkpoint(run, ranks=ranks).check_fit("model", model)

    for count in (1, 2, 3):
        raised = together(count, read)
        assert {type(e) for e in raised} == {CorruptError} and len({str(e) for e in raised}) == 1
        assert message in str(raised[0]) and str(run) in str(raised[0])


def test_what_is_not_there_is_refused_alike(saved, tmp_path):
    run = shutil.copytree(saved[2], tmp_path / "run")
    found = open_checkpoint(run)
    with pytest.raises(CorruptError, match="lacks more of the model"):
        found.read("model", "more")
    with pytest.raises(CorruptError, match="has no ema-00001"):
        found.tensors("ema")
    for which, message in (("6", "holds steps 5; or last"), ("x", "or last, best")):
        raised = together(2, lambda r, which=which: open_checkpoint(run, which, r))
        assert all(type(e) is UsageError and message in str(e) for e in raised), raised
    # One rank does not see a newer checkpoint yet: all take that of rank 0.
    shutil.copytree(run / "checkpoints", tmp_path / "other" / "checkpoints")
    (tmp_path / "other" / "config.json").touch()
    well(save_on(tmp_path / "other", 2, step=6))
    runs = [run, tmp_path / "other"]
    opened = well(together(2, lambda r: open_checkpoint(runs[r.rank], ranks=r)))
    assert [found.step for found in opened] == [5, 5]
    raised = together(2, lambda r: open_checkpoint(runs[1 - r.rank], "6", r))
    assert len({str(e) for e in raised}) == 1 and "step-00000006" in str(raised[0])
    # One that is not seen by all is passed over by all.
    opened = well(together(2, lambda r: open_checkpoint(runs[1 - r.rank], ranks=r)))
    assert [found.step for found in opened] == [5, 5]


def test_weights_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    """Read, that is; written they are not (test_write.py)."""
    monkeypatch.setattr(saving, "require_finite", lambda kind, named: None)
    (tmp_path / "config.json").touch()
    for step, bad in enumerate((torch.nan, torch.inf)):
        x = torch.tensor([1.0, 2.0, bad])
        save(tmp_path, step, {"model": {"w[0:3]": x}}, {"shapes": {"w": [3]}})
        found = open_checkpoint(tmp_path)
        assert found.piece("model", "w", 0, 2).tolist() == [1, 2]
        with pytest.raises(CorruptError, match="w holds values that are not finite"):
            found.piece("model", "w", 1, 3)


def test_a_state_of_another_shape_than_its_parameter_is_refused(tmp_path):
    (tmp_path / "config.json").touch()
    w = torch.ones(4, 2)
    save(tmp_path, 1, {"model": {"w": w}, "optimizer": {"exp_avg.w": torch.ones(2, 4)}}, {})
    with pytest.raises(CorruptError, match=r"exp_avg.w is \[2, 4\], unlike its parameter"):
        open_checkpoint(tmp_path).piece("exp_avg", "w", 0, 2)


WHERE = ["write_whole", "write_json", "sync_folder", "_make_empty"]


@pytest.mark.parametrize("name", WHERE)
def test_a_rank_that_cannot_write_stops_all(tmp_path, monkeypatch, name):
    """write_whole fails on rank 1, the rest, which rank 0 alone does, on rank 0."""
    real, rank = getattr(saving, name), 1 if name == "write_whole" else 0

    def fail(*args):
        if rank == 0 or any("00002-of-00003" in str(x) for x in args):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(saving, name, fail)
        raised = save_on(tmp_path, 3)
    for r, error in enumerate(raised):
        assert type(error) is (OSError if r == rank else UnavailableError)
        assert "No space left" in str(error) and (r == rank or f"rank {rank}" in str(error))
    assert not RunFolder(tmp_path).checkpoints()
    assert not list(tmp_path.glob("checkpoints/.*"))
    well(save_on(tmp_path, 3))
    (tmp_path / "config.json").touch()
    assert open_checkpoint(tmp_path).step == 5


def test_what_a_caller_gets_wrong_is_never_written(tmp_path):
    for shapes, key, count in (({}, "w[0:2]", 2), ({"w": [4]}, "w[0:2]", 3)):
        with pytest.raises(ValueError, match=r"w\[0:2\] is"):
            save(tmp_path, 1, {"model": {key: torch.ones(count)}}, {"shapes": shapes})
    tensors = [{"model": {}, "ema": {}}, {"model": {}}]
    raised = together(2, lambda r: save(tmp_path, 1, tensors[r.rank], {}, r))
    assert all("ema-00001-of-00001.safetensors was expected" in str(e) for e in raised)
    assert not RunFolder(tmp_path).checkpoints()
