"""14 + 16 steps are 30 steps, bit for bit; and each part of what is saved is needed for that."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from minillm.checkpoint.run_folder import RunFolder
from minillm.model.recurrence import state_keys
from minillm.optim.loss_scale import start_scale
from minillm.runtime.files import read_json
from minillm.training import divergence
from minillm.training.divergence import DivergenceGuard
from minillm.training.gradients import accumulate
from minillm.training.steps import draw_recurrences, steps

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


def no_weights(setup, state) -> None:
    next(iter(setup.model.parameters())).data.mul_(1.0001)


def no_moments(setup, state) -> None:
    for optimizer in setup.sharding.optimizers:
        for kept in optimizer.state.values():
            for x in kept.values():
                x.zero_() if torch.is_tensor(x) and x.dim() else None


def no_step_counts(setup, state) -> None:
    for optimizer in setup.sharding.optimizers:
        for kept in optimizer.state.values():
            if "step" in kept:
                kept["step"] = torch.zeros_like(kept["step"])


def no_average(setup, state) -> None:
    for name, p in setup.model.named_parameters():
        state.average.weights[name].copy_(p.detach())


def no_position(setup, state) -> None:
    state.progress.skipped = 1  # the batch after the one whose turn it is


def no_schedule(setup, state) -> None:
    state.schedule = replace(state.schedule, pace=((0, 0.0), (STEPS, 0.9)))


def no_tokens(setup, state) -> None:
    state.progress.tokens = 0


def no_scale(setup, state) -> None:
    state.loss_scale = start_scale(torch.float16)
    state.loss_scale.value /= 4


ITEMS = [
    ("muon", no_weights), ("muon", no_moments), ("adamw", no_moments), ("adamw", no_step_counts),
    ("muon", no_average), ("muon", no_position), ("muon", no_schedule), ("muon", no_tokens),
    ("fp16", no_scale),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind, forget", ITEMS, ids=lambda x: getattr(x, "__name__", x))
def test_whatever_is_forgotten_shows(train, tmp_path, whole, kind, forget):
    def forgetful(setup, state, *args):  # when all is taken from the checkpoint
        forget(setup, state)
        return steps(setup, state, *args)

    run = broken_off(whole(kind), tmp_path / "run")
    assert train("--resume", run, steps=forgetful) == 0
    assert outcome(run) != outcome(whole(kind))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dropout", "recurrences", "keys"])
def test_whatever_is_drawn_is_of_the_step(train, tmp_path, whole, monkeypatch, name):
    """Dropout, recurrence and start states: a resumed run that draws as at its start is seen."""
    run, replaced = broken_off(whole("muon"), tmp_path / "run"), {}
    if name == "dropout":
        monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    else:
        replaced["steps"] = partial(drawing_as_at_the_start, name)
    assert train("--resume", run, **replaced) == 0
    assert outcome(run) != outcome(whole("muon"))


def drawing_as_at_the_start(name, setup, state, *args):
    """The steps, with the recurrences or the keys of the batch BROKEN steps before each."""
    config = setup.config

    def wrong(sharding, tokens, targets, keys, micro_batch, recurrences, *rest):
        at = state.progress.position - BROKEN
        if name == "keys":
            first = at * config.batch_size
            keys = state_keys(config.seed, torch.arange(first, first + len(keys)))
        else:
            recurrences = draw_recurrences(config, setup.model.config, at, state.share_done)
        return accumulate(sharding, tokens, targets, keys, micro_batch, recurrences, *rest)

    return steps(setup, state, *args, accumulate=wrong)


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", [False, True])
def test_the_history_of_norms_is_kept(train, tmp_path, monkeypatch, forgotten):
    """A spike after the break is a spike because of what was before it."""
    monkeypatch.setattr(divergence, "ENOUGH", 16)

    def spiked(sharding, *args):
        loss = accumulate(sharding, *args)
        if len(calls) == 20:
            for p in sharding.parameters.values():
                p.grad = None if p.grad is None else p.grad * 1e4
        calls.append(1)
        return loss

    def spiking(setup, state, *args):
        if forgotten:
            state.divergence = DivergenceGuard()
        return steps(setup, state, *args, accumulate=spiked)

    calls = []
    assert train("--out", tmp_path / "whole", *FLAGS, *KINDS["adamw"], steps=spiking) == 0
    assert len((tmp_path / "whole/bad-steps.jsonl").read_text().splitlines()) == 1
    run = broken_off(tmp_path / "whole", tmp_path / "run")
    calls = [1] * BROKEN
    assert train("--resume", run, steps=spiking) == 0
    assert (outcome(run) == outcome(tmp_path / "whole")) != forgotten
