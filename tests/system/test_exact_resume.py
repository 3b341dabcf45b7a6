"""14 + 16 steps are 30 steps, bit for bit; and each part of what is saved is needed for that."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillm.checkpoint.run_folder import RunFolder
from minillm.optim.loss_scale import start_scale
from minillm.runtime.files import read_json
from minillm.scripts import train as script
from minillm.training import divergence as guard
from minillm.training.divergence import Guard

BROKEN, STEPS = 14, 30
FLAGS = [
    "--recurrent", "1,1,1", "--n-layer", "3", "--mean-recurrence", "2", "--recurrence-groups", "2",
    "--dropout", "0.1", "--ema", "0.9", "--schedule", "cosine", "--warmup", "3",
    "--steps", str(STEPS), "--save-every", str(BROKEN), "--keep-last", "9", "--log-every", "1",
    "--eval-every", "10",
]  # fmt: skip
KINDS = {
    "muon": ["--optimizer", "muon", "--learning-rate", "0.02"],
    "adamw": ["--optimizer", "adamw", "--learning-rate", "0.01"],
    "bf16": ["--optimizer", "adamw", "--learning-rate", "0.01", "--dtype", "bf16"],
    "fp16": ["--optimizer", "adamw", "--learning-rate", "0.01", "--dtype", "fp16"],
}


def outcome(run: Path) -> tuple[dict, list]:
    """The hashes of the last checkpoint's tensors, and what was logged of every step."""
    steps = RunFolder(run).checkpoints()
    files = read_json(steps[max(steps)] / "manifest.json")["files"]
    hashes = {name: entry["sha256"] for name, entry in files.items() if "safetensors" in name}
    keys = ("step", "loss", "lr", "grad_norm", "recurrence", "val_loss", "loss_scale", "tokens")
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return hashes, [[row.get(key) for key in keys] for row in rows]


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """whole(kind): a run that nothing has disturbed, made once."""
    made = {}

    def run(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "run"
            assert train("--out", made[kind], *FLAGS, *KINDS[kind]) == 0
        return made[kind]

    return run


def broken_off(run: Path, copy: Path) -> Path:
    """A copy of a run as if its process had been killed after the checkpoint of step BROKEN."""
    shutil.copytree(run, copy)
    for step, folder in RunFolder(copy).checkpoints().items():
        if step > BROKEN:
            shutil.rmtree(folder)
    return copy


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "muon" else pytest.mark.slow) for kind in KINDS]
)
def test_a_resumed_run_is_the_undisturbed_one(train, tmp_path, whole, kind):
    run = broken_off(whole(kind), tmp_path / "run")
    assert train("--resume", run) == 0
    assert outcome(run) == outcome(whole(kind))
    hashes, rows = outcome(run)
    assert len(hashes) == 3 and len(rows) == STEPS + 1  # and the last evaluation's
    assert len({row[4] for row in rows}) > 2  # the recurrence was drawn


def no_weights(t) -> None:
    next(iter(t.model.parameters())).data.mul_(1.0001)


def no_moments(t) -> None:
    for optimizer in t.sharding.optimizers:
        for state in optimizer.state.values():
            for x in state.values():
                x.zero_() if torch.is_tensor(x) and x.dim() else None


def no_step_counts(t) -> None:
    for optimizer in t.sharding.optimizers:
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] = torch.zeros_like(state["step"])


def no_average(t) -> None:
    for name, p in t.model.named_parameters():
        t.average.weights[name].copy_(p.detach())


def no_position(t) -> None:
    t.progress.skipped = 1  # the batch after the one whose turn it is


def no_schedule(t) -> None:
    t.plan = replace(t.plan, pace=((0, 0.0), (STEPS, 0.9)))


def no_tokens(t) -> None:
    t.progress.tokens = 0


def no_scale(t) -> None:
    t.scale = start_scale(torch.float16)
    t.scale.value /= 4


ITEMS = [
    ("muon", no_weights), ("muon", no_moments), ("adamw", no_moments), ("adamw", no_step_counts),
    ("muon", no_average), ("muon", no_position), ("muon", no_schedule), ("muon", no_tokens),
    ("fp16", no_scale),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind, forget", ITEMS, ids=lambda x: getattr(x, "__name__", x))
def test_whatever_is_forgotten_shows(train, tmp_path, whole, monkeypatch, kind, forget):
    replan = script.replan

    def forgetful(t, *args):  # the last that a resumed run takes from its checkpoint
        replan(t, *args)
        forget(t)

    monkeypatch.setattr(script, "replan", forgetful)
    run = broken_off(whole(kind), tmp_path / "run")
    assert train("--resume", run) == 0
    assert outcome(run) != outcome(whole(kind))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manual_seed", "recurrences", "state_keys"])
def test_whatever_is_drawn_is_of_the_step(train, tmp_path, whole, monkeypatch, name):
    """Dropout, recurrence and start states: a resumed run that draws as at its start is seen."""
    run = broken_off(whole("muon"), tmp_path / "run")
    if name == "manual_seed":
        monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    elif name == "recurrences":
        drawn = script.recurrences

        def as_at_the_start(t):
            t.progress.skipped -= BROKEN
            found = drawn(t)
            t.progress.skipped += BROKEN
            return found

        monkeypatch.setattr(script, "recurrences", as_at_the_start)
    else:
        keys = script.state_keys
        monkeypatch.setattr(script, "state_keys", lambda seed, n: keys(seed, n - BROKEN * 4))
    assert train("--resume", run) == 0
    assert outcome(run) != outcome(whole("muon"))


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", [False, True])
def test_the_history_of_norms_is_kept(train, tmp_path, monkeypatch, forgotten):
    """A spike after the break is a spike because of what was before it."""
    monkeypatch.setattr(guard, "ENOUGH", 16)
    whole, restore = script.accumulate, script.restore

    def spiked(sharding, *args):
        loss = whole(sharding, *args)
        if len(calls) == 20:
            for p in sharding.parameters.values():
                p.grad = None if p.grad is None else p.grad * 1e4
        calls.append(1)
        return loss

    def forgetful(t, *args):
        restore(t, *args)
        t.guard = Guard() if forgotten else t.guard

    monkeypatch.setattr(script, "accumulate", spiked)
    monkeypatch.setattr(script, "restore", forgetful)
    calls = []
    assert train("--out", tmp_path / "whole", *FLAGS, *KINDS["adamw"]) == 0
    assert len((tmp_path / "whole/bad-steps.jsonl").read_text().splitlines()) == 1
    run = broken_off(tmp_path / "whole", tmp_path / "run")
    calls = [1] * BROKEN
    assert train("--resume", run) == 0
    assert (outcome(run) == outcome(tmp_path / "whole")) != forgotten
