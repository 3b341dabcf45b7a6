"""Run folders and checkpoints: bit for bit, whole or absent, and every damage noticed."""

import os
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.checkpoint import write as saving
from minillm.checkpoint.find import load_run, open_checkpoint
from minillm.checkpoint.read import verified
from minillm.checkpoint.run_folder import RunFolder
from minillm.checkpoint.write import prune, save
from minillm.config.train import ModelConfig
from minillm.distributed.ranks import ALONE
from minillm.distributed.state_dict import load_optimizer_tensors, load_weights
from minillm.errors import CorruptError, UsageError
from minillm.model.gpt import GPT
from minillm.ops import EAGER
from minillm.optim.build import make_optimizers, set_learning_rate
from minillm.optim.ema import Average
from minillm.runtime import files as storage, program
from minillm.scripts import sample
from tests.support.optimizer_states import optimizer_tensors

WEIGHTS = "model-00001-of-00001.safetensors"
README = Path(__file__).resolve().parents[2] / "README.md"
AVERAGED = "ema-00001-of-00001.safetensors"


def small_model(seed: int = 0) -> GPT:
    config = ModelConfig(vocab_size=11, seq_len=8, n_layer=2, n_head=2, d_model=16, bias=True)
    return GPT(config, EAGER, generator=torch.Generator().manual_seed(seed))


def take_steps(model, optimizers, average, count: int) -> None:
    for step in range(count):
        tokens = (torch.arange(16).view(2, 8) * (step + 3)) % 11
        model(tokens, tokens).backward()
        set_learning_rate(optimizers, 0.01)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(step + 1)


def equipped(name: str, seed: int = 0):
    model = small_model(seed)
    parameters = dict(model.named_parameters())
    optimizers = make_optimizers(name, parameters, model.matrices(), EAGER, (0.9, 0.95), 0.1)
    return model, optimizers, Average(parameters, 0.9)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_optimisers_and_average_come_back_bit_for_bit(tmp_path, name):
    model, optimizers, average = equipped(name)
    take_steps(model, optimizers, average, 3)
    parameters = dict(model.named_parameters())
    names = {p: n for n, p in parameters.items()}
    state = optimizer_tensors(optimizers, names)
    tensors = {"model": parameters, "optimizer": state, "ema": average.weights}
    save(tmp_path, 3, tensors, {"pace": [[0, 0.0], [9, 1.0]]})

    found = verified(tmp_path / "checkpoints" / "step-00000003", 3, ALONE)
    assert found.kinds == {"model", "optimizer", "ema"} and found.state["pace"][1] == [9, 1.0]
    for kind, named in tensors.items():
        loaded = found.tensors(kind)
        assert loaded.keys() == named.keys()
        for key, value in named.items():
            assert loaded[key].dtype == value.dtype
            assert torch.equal(loaded[key], value), key

    other, others, mean = equipped(name, seed=1)
    load_weights(other, found.tensors("model"), found.folder)
    theirs = dict(other.named_parameters())
    load_optimizer_tensors(others, theirs, found.tensors("optimizer"))
    mean.weights = found.tensors("ema")
    for m, o, a in ((model, optimizers, average), (other, others, mean)):
        take_steps(m, o, a, 2)
    for key, p in parameters.items():
        assert torch.equal(p, theirs[key]), key
        assert torch.equal(average.weights[key], mean.weights[key]), key


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    return shutil.copytree(tiny_run, tmp_path / "run")


def reseal(folder: Path) -> None:
    """Make the manifest agree with what the files of a checkpoint are now."""
    names = [p for p in sorted(folder.iterdir()) if p.name != "manifest.json"]
    files = {p.name: {"bytes": p.stat().st_size, "sha256": storage.file_digest(p)} for p in names}
    storage.write_json(folder / "manifest.json", {"files": files})


def last(run: Path) -> Path:
    return run / "checkpoints" / "step-00000008"


FILES = ["config.json", "tokenizer.json", *(
    f"checkpoints/step-00000008/{name}"
    for name in ("manifest.json", "state.json", WEIGHTS, AVERAGED,
                 "optimizer-00001-of-00001.safetensors")
)]  # fmt: skip


@pytest.mark.parametrize("what", ["flip", "cut", "empty", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_noticed(run, name, what, capsys):
    path = run / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    changed = {"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b""}
    path.unlink() if what == "gone" else path.write_bytes(changed[what])
    code = program.run("sample.py", sample.main, [str(run), "--checkpoint", "8"])
    message = capsys.readouterr().err
    if name.endswith((WEIGHTS, "optimizer-00001-of-00001.safetensors")):
        assert code == 0  # it reads the averaged weights alone
        with pytest.raises(CorruptError, match=f"{path.name}: (damaged|(is )?missing).*; good: 4"):
            open_checkpoint(run, "8")
        return
    expected = 2 if what == "gone" and name == "config.json" else 3  # without it: no run at all
    assert code == expected, message
    assert message.count("\n") == 1 and str(run) in message


def rename(tensors):
    return {("x" if k == "norm.weight" else k): t for k, t in tensors.items()}


EDITS = [
    (lambda t: {k: v for k, v in t.items() if k != "norm.weight"}, "lacks norm.weight"),
    (lambda t: {**t, "more": torch.zeros(1)}, "has more, which is unknown"),
    (rename, "lacks norm.weight"),
    (lambda t: {**t, "norm.weight": torch.ones(7)}, r"norm.weight is torch.float32 \[7\]"),
    (lambda t: {**t, "norm.weight": torch.ones(16).long()}, "norm.weight is torch.int64"),
    (lambda t: {**t, "norm.weight": torch.full((16,), torch.nan)}, "norm.weight holds values"),
    (lambda t: {**t, "norm.weight": torch.full((16,), torch.inf)}, "norm.weight holds values"),
]


@pytest.mark.parametrize("edit, message", EDITS)
def test_tensors_that_do_not_belong(run, edit, message):
    path = last(run) / AVERAGED
    save_file(edit(load_file(path)), path)
    reseal(last(run))
    with pytest.raises(CorruptError, match=message) as refusal:
        load_run(run)
    assert str(last(run)) in str(refusal.value)


@pytest.mark.parametrize(
    "kind, edit, message",
    [
        (
            "optimizer",
            lambda t: {**t, "exp_avg.x": torch.ones(1)},
            "holds exp_avg.x, which the run's",
        ),
        (
            "optimizer",
            lambda t: {**t, "exp_avg.norm.weight": torch.ones(3)},
            "exp_avg.norm.weight is torch.float32 [3], expected [16]",
        ),
        (
            "optimizer",
            lambda t: {k: v for k, v in t.items() if k != "exp_avg_sq.norm.weight"},
            "lacks exp_avg_sq.norm.weight, which the run's optimiser keeps",
        ),
        (
            "optimizer",
            lambda t: {**t, "step.norm.weight": torch.ones(16)},
            "step.norm.weight is torch.float32 [16], expected []",
        ),
        (
            "optimizer",
            lambda t: {**t, "exp_avg.norm.weight": torch.ones(16).int()},
            "exp_avg.norm.weight is torch.int32 [16], expected [16]",
        ),
        ("optimizer", lambda t: {**t, "momentum.norm.weight": torch.ones(16)}, "holds momentum.no"),
        ("ema", rename, "lacks norm.weight"),
        ("model", rename, "lacks norm.weight"),
    ],
)
def test_a_resume_checks_what_it_reads(run, train, capsys, kind, edit, message):
    path = last(run) / f"{kind}-00001-of-00001.safetensors"
    save_file(edit(load_file(path)), path)
    reseal(last(run))
    assert train("--resume", run, "--steps", "9") == 3
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 a pickle", b"\xff" * 64, b"\x08" + b"\0" * 30])
def test_files_that_are_no_safetensors(run, data):
    (last(run) / AVERAGED).write_bytes(data)
    reseal(last(run))
    with pytest.raises(CorruptError, match=AVERAGED):
        load_run(run)


def test_load_run_prefers_the_average(run):
    model, tokenizer, config = load_run(run)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert tokenizer.kind == "byte" and config.vocab_size == 257 and model.config == config
    averaged, plain = load_file(last(run) / AVERAGED), load_file(last(run) / WEIGHTS)
    for name, p in model.named_parameters():
        assert torch.equal(p, averaged[name])
    assert any(not torch.equal(averaged[name], plain[name]) for name in plain)
    (last(run) / AVERAGED).unlink()
    reseal(last(run))
    for name, p in load_run(run)[0].named_parameters():
        assert torch.equal(p, plain[name])


def test_an_older_checkpoint_can_be_asked_for(run):
    older = load_run(str(run), checkpoint="4")[0]
    averaged = load_file(run / "checkpoints" / "step-00000004" / AVERAGED)
    assert torch.equal(older.head.weight, averaged["head.weight"])
    assert open_checkpoint(run, "best").step in (4, 8)
    with pytest.raises(UsageError, match="checkpoint 5: .* holds steps 4, 8; or last, best"):
        open_checkpoint(run, "5")


def test_best_is_what_the_last_checkpoint_says(run):
    state = storage.read_json(last(run) / "state.json")
    storage.write_json(
        last(run) / "state.json", {**state, "progress": {**state["progress"], "best_step": 4}}
    )
    reseal(last(run))
    assert open_checkpoint(run, "best").step == 4
    assert open_checkpoint(run).step == 8


def test_prune_keeps_the_last_ones_and_the_best(tmp_path):
    for step in (1, 2, 3, 10, 20):
        save(tmp_path, step, {"model": {"w": torch.ones(1)}}, {})
    prune(tmp_path, 2, best=2)
    assert sorted(RunFolder(tmp_path).checkpoints()) == [2, 10, 20]
    prune(tmp_path, 1, best=None)
    assert sorted(RunFolder(tmp_path).checkpoints()) == [20]
    prune(tmp_path, 5, best=None)
    assert sorted(RunFolder(tmp_path).checkpoints()) == [20]


def test_a_save_that_fails_midway_leaves_the_old_checkpoint(run, monkeypatch):
    before = load_file(last(run) / WEIGHTS)
    calls, real = [], saving.write_whole

    def fail(path, pieces):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(path, pieces)

    monkeypatch.setattr(saving, "write_whole", fail)
    for step in (8, 9):
        calls.clear()
        tensors = {"model": {"w": torch.ones(1)}, "optimizer": {"w": torch.ones(1)}}
        with pytest.raises(OSError, match="No space"):
            save(run, step, tensors, {})
    found = open_checkpoint(run)
    assert found.step == 8
    assert torch.equal(found.tensors("model")["head.weight"], before["head.weight"])
    monkeypatch.undo()
    save(run, 9, {"model": {"w": torch.ones(1)}}, {})  # what was left behind is in nobody's way
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.name[-5:] == "00009") == [
        "step-00000009"
    ]


def test_saving_a_step_again_replaces_it(tmp_path):
    for value in (1.0, 2.0):
        save(tmp_path, 5, {"model": {"w": torch.tensor(value)}}, {})
    found = verified(tmp_path / "checkpoints" / "step-00000005", 5, ALONE)
    assert found.tensors("model")["w"] == 2.0


def test_a_renamed_checkpoint_is_refused(run):
    last(run).rename(run / "checkpoints" / "step-00000012")
    with pytest.raises(CorruptError, match="holds step 8"):
        load_run(run, checkpoint="12")


def test_other_folders_beside_the_checkpoints_are_ignored(run):
    for name in (".step-00000009.tmp", "step-9", "step-00000010", "notes"):
        (run / "checkpoints" / name).mkdir()
    assert open_checkpoint(run).step == 8


def test_a_users_file_in_a_checkpoint_leaves_it_readable(run):
    (last(run) / "merged.safetensors").write_bytes(b"")
    assert open_checkpoint(run).step == 8
    shutil.copy(last(run) / WEIGHTS, last(run) / "ema-00001-of-00001.safetensors.1")
    assert open_checkpoint(run).step == 8


def test_another_tokenizer_is_refused(run):
    (run / "tokenizer.json").write_text('{"version": 1, "kind": "char", "characters": "ab"}\n')
    with pytest.raises(CorruptError, match="is not the tokenizer that the run was trained with"):
        load_run(run)


@pytest.mark.skipif(not README.is_file(), reason="the README is not here")
def test_the_lines_of_python_in_the_readme(tiny_run, tmp_path, monkeypatch, capsys):
    lines = README.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert "minillm.load" in lines and ".generate(" in lines
    shutil.copytree(tiny_run, tmp_path / "runs" / "nano-1")
    monkeypatch.chdir(tmp_path)
    Path("lines.py").write_text(lines, encoding="utf-8")
    runpy.run_path("lines.py")
    assert len(capsys.readouterr().out) > 5


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
def test_no_file_of_a_checkpoint_stays_mapped(run):
    """A process dies of reading a mapped file that was cut off in the meantime."""
    found = open_checkpoint(run)
    held = [found.tensors(kind) for kind in ("model", "optimizer", "ema")], load_run(run)
    assert str(run) not in Path("/proc/self/maps").read_text()
    for path in run.rglob("*.safetensors"):
        os.truncate(path, 0)
    assert all(t.isfinite().all() for named in held[0] for t in named.values())
