"""The steps of a training take the loss as an argument."""

import json
from functools import partial

import pytest

from minillm.training.gradients import next_token_loss
from minillm.training.steps import steps


def test_any_loss_is_trained(train, tmp_path):
    """Twice the loss: with AdamW and clipped gradients the weights move as before."""
    calls = []

    def twice(forward, *batch):
        calls.append([x.shape[0] for x in (batch[0], batch[1], batch[3])])
        return 2 * next_token_loss(forward, *batch)

    flags = ["--optimizer", "adamw", "--grad-clip", "0.01", "--log-every", "1", "--steps", "4",
             "--micro-batch-size", "2", "--eval-every", "0"]  # fmt: skip
    losses = {}
    for name, loss in (("plain", next_token_loss), ("twice", twice)):
        assert train("--out", tmp_path / name, *flags, steps=partial(steps, loss=loss)) == 0
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = [row["loss"] for row in rows if "loss" in row]
    assert calls == [[2, 2, 2]] * 2 * 4  # two micro-batches a step
    assert losses["twice"] == pytest.approx([2 * x for x in losses["plain"]], rel=1e-4)
