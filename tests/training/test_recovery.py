"""Steps that must not be taken: left out, told of, and when there is no end of them, gone back."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from minillm.checkpoint.find import load_run, open_checkpoint
from minillm.checkpoint.run_folder import RunFolder
from minillm.checkpoint.write import save
from minillm.model.gpt import GPT
from minillm.training.steps import accumulate, steps
from tests.support.broad import broad

LAYER = "blocks.0.mlp.down.weight"
FLAGS = ["--optimizer", "adamw", "--learning-rate", "0.01", "--eval-every", "0", "--ema", "0.5"]


def metrics(run: Path) -> list[dict]:
    """The rows of steps in metrics.jsonl."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "lr" in row]


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Injector:
    """Steps for `train(steps=...)` that spoil gradients where `when` says so.

    when(position) -> what gradients of LAYER are set to, or None.
    after(state, model): called after each step.
    positions, weights: the batches that were read, and the weights after each step.
    """

    def __init__(
        self,
        when: Callable[[int], float | None] = lambda position: None,
        after: Callable = lambda state, model: None,
    ) -> None:
        self.when, self.after, self.positions, self.weights = when, after, [], [{}]

    def __call__(self, setup, state, *args):
        def spoilt(sharding, *batch):
            loss = accumulate(sharding, *batch)
            self.positions.append(state.progress.position)
            self.before_step(sharding)
            value = self.when(state.progress.position)
            if value is not None:
                sharding.parameters[LAYER].grad.fill_(value)
            return loss

        for result in steps(setup, state, *args, accumulate=spoilt):
            self.weights.append(weights_of(setup.model))
            self.after(state, setup.model)
            yield result

    def before_step(self, sharding):
        """Look at the gradients and the optimisers, which have not stepped yet."""


@broad("value", [math.nan, math.inf, -math.inf, 1e30], quick=(0, 3))
@broad("bad", [{0}, {5}, {3, 4}], quick=(2,))
def test_a_bad_step_moves_nothing_and_is_told(train, tmp_path, capfd, bad, value):
    injected = Injector(lambda position: value if position in bad else None)
    assert train("--out", tmp_path / "run", *FLAGS, steps=injected) == 0
    assert len(injected.weights) == 9
    for step in range(1, 8):
        moved = any(
            not torch.equal(injected.weights[step][n], x)
            for n, x in injected.weights[step + 1].items()
        )
        assert moved == (step not in bad)
        assert all(x.isfinite().all() for x in injected.weights[step + 1].values())
    said = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    assert len(said) == len(bad)
    for line, step in zip(said, sorted(bad), strict=True):
        assert line.startswith(f"warning   step {step + 1} left out: gradient norm ")
        assert f"{LAYER} went first" in line
        assert ("none before it" in line) == (step == 0)
    records = [json.loads(line) for line in (tmp_path / "run/bad-steps.jsonl").open()]
    assert [r["position"] for r in records] == sorted(bad) and records[0]["layer"] == LAYER
    assert all(r["step"] == r["position"] + 1 for r in records)  # as in metrics.jsonl
    t = open_checkpoint(tmp_path / "run")
    assert t.state["guard"]["left_out"] == [step + 1 for step in sorted(bad)]
    assert t.state["progress"]["tokens"] == 8 * 4 * 16  # what is left out is consumed
    rows = metrics(tmp_path / "run")
    if not math.isfinite(value):
        assert all((row["grad_norm"] is None) == (row["step"] - 1 in bad) for row in rows)


def test_the_sequences_of_a_bad_step_are_kept(train, tmp_path, text_file):
    injected = Injector(lambda position: math.nan if position == 2 else None)
    assert train("--out", tmp_path / "run", *FLAGS, steps=injected) == 0
    (record,) = map(json.loads, (tmp_path / "run/bad-steps.jsonl").open())
    assert len(record["sequences"]) == 4 and record["position"] == 2 and record["grad_norm"] is None
    text = text_file.read_text()
    assert all(len(s) >= 15 and s.replace("\x00", "") in text for s in record["sequences"])


def test_nan_in_one_micro_batch_of_several(train, tmp_path, monkeypatch, capfd):
    calls, whole = [], GPT.forward

    def forward(self, *args, **kwargs):
        loss = whole(self, *args, **kwargs)
        if self.training:
            calls.append(1)
            return loss * (math.nan if len(calls) == 7 else 1)
        return loss

    monkeypatch.setattr(GPT, "forward", forward)
    assert train("--out", tmp_path / "run", *FLAGS, "--micro-batch-size", "2") == 0
    assert "left out: loss nan" in capfd.readouterr().err
    model = load_run(tmp_path / "run")[0]
    assert all(p.isfinite().all() for p in model.parameters())


ROLLED = [*FLAGS, "--steps", "40", "--save-every", "4", "--keep-last", "3", "--schedule", "wsd"]


def test_ten_in_a_row_go_back_and_skip_the_data(train, tmp_path, capfd):
    injected = Injector(lambda n: math.nan if 12 <= n < 60 else None)
    assert train("--out", tmp_path / "run", *ROLLED, steps=injected) == 0
    err = capfd.readouterr().err
    assert err.count("left out: ") == 10
    assert (
        "warning   too many bad steps: going on from step 12, with the text from batch 212 on "
        "(roll-back 1 of 3)"
    ) in err
    assert injected.positions == [*range(22), *range(212, 240)]
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 41))
    state = open_checkpoint(tmp_path / "run").state
    assert state["progress"]["skipped"] == 200 and state["guard"]["rollbacks"] == 1
    assert state["guard"]["seen"] == 40  # the history is that of the checkpoint, and what came
    assert sorted(RunFolder(tmp_path / "run").checkpoints()) == [32, 36, 40]
    # Whoever goes on from a checkpoint after it does the same.
    final = weights_of(load_run(tmp_path / "run")[0])
    (tmp_path / "run/checkpoints/step-00000040").rename(tmp_path / "gone")
    assert train("--resume", tmp_path / "run") == 0
    assert all(
        torch.equal(x, final[n]) for n, x in weights_of(load_run(tmp_path / "run")[0]).items()
    )


def test_a_roll_back_killed_before_it_saves_happens_again(train, tmp_path):
    injected = Injector(lambda n: math.nan if 12 <= n < 60 else None)
    assert train("--out", tmp_path / "whole", *ROLLED, steps=injected) == 0
    saves = []

    def killed(run, step, tensors, state, ranks):
        saves.append(step)
        if state["guard"]["rollbacks"]:
            raise KeyboardInterrupt  # the first after the roll-back
        return save(run, step, tensors, state, ranks)

    assert train("--out", tmp_path / "run", *ROLLED, steps=injected, write=killed) == 130
    assert saves[-1] == 16 and sorted(RunFolder(tmp_path / "run").checkpoints()) == [12]
    assert train("--resume", tmp_path / "run", steps=injected) == 0
    runs = [weights_of(load_run(tmp_path / name)[0]) for name in ("whole", "run")]
    assert all(torch.equal(x, runs[1][n]) for n, x in runs[0].items())


def test_the_fourth_time_it_is_over(train, tmp_path, capfd):
    injected = Injector(lambda n: math.inf if n >= 6 else None)
    assert train("--out", tmp_path / "run", *ROLLED, steps=injected) == 6
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("train.py: error: step ") and "diverged again after 3 roll-backs" in last
    assert "--learning-rate" in last
    assert len(injected.positions) == 6 + 4 * 10
    past = open_checkpoint(tmp_path / "run")
    assert all(x.isfinite().all() for x in past.tensors("model").values())
    assert load_run(tmp_path / "run")


def test_without_a_checkpoint_the_weights_stay(train, tmp_path, capfd):
    injected = Injector(lambda n: math.nan if 3 <= n < 30 else None)
    assert train("--out", tmp_path / "run", *FLAGS, "--steps", "16", steps=injected) == 0
    assert "going on from the weights as they are, with the text from batch 213" in (
        capfd.readouterr().err
    )
    assert injected.positions == [*range(13), 213, 214, 215]


def test_weights_that_are_not_finite_are_never_saved(train, tmp_path, capfd):
    def spoil(state, model):
        if state.progress.step == 8 and not state.divergence.rollbacks:
            model.head.weight.data[0, 0] = math.inf

    flags = [*FLAGS, "--steps", "12", "--save-every", "4"]
    assert train("--out", tmp_path / "run", *flags, steps=Injector(after=spoil)) == 0
    err = capfd.readouterr().err
    assert "head.weight" in err and "going on from step 4" in err
    for step in RunFolder(tmp_path / "run").checkpoints():
        past = open_checkpoint(tmp_path / "run", str(step))
        for kind in ("model", "ema"):
            assert all(x.isfinite().all() for x in past.tensors(kind).values())
