"""fp16: the loss is scaled, steps that overflow are left out, and the scale is not lost."""

import json
import math
from functools import partial

import torch

from minillm.checkpoint.find import open_checkpoint
from minillm.optim.loss_scale import GROWTH_INTERVAL, LEAST, MOST, LossScale, start_scale
from minillm.training.gradients import accumulate
from minillm.training.steps import steps


def test_the_scale_halves_on_overflow_and_doubles_after_long_without():
    scale = LossScale(8.0)
    assert scale.is_to_blame(2.0, math.inf)
    assert (scale.value, scale.good) == (4.0, 0)
    for _ in range(GROWTH_INTERVAL - 1):
        scale.went_well()
    assert scale.value == 4.0
    assert scale.is_to_blame(2.0, math.nan)
    assert (scale.value, scale.good) == (2.0, 0)  # the count begins anew
    for _ in range(GROWTH_INTERVAL):
        scale.went_well()
    assert (scale.value, scale.good) == (4.0, 0)
    scale = LossScale(MOST, GROWTH_INTERVAL - 1)
    scale.went_well()
    assert scale.value == MOST


def test_what_overflows_unscaled_is_no_matter_of_the_scale():
    scale = LossScale(4.0)
    assert [scale.is_to_blame(2.0, math.inf) for _ in range(4)] == [True, True, False, False]
    assert scale.value == LEAST
    assert not LossScale().is_to_blame(math.nan, math.nan) and not LossScale().is_to_blame(2.0, 1.0)


def test_only_fp16_needs_a_scale():
    assert start_scale(torch.float16).value == 2.0**16
    assert start_scale(torch.bfloat16) is None and start_scale(torch.float32) is None


def test_a_step_that_overflows_is_left_out(train, tmp_path):
    """Weights and moments stay as they are; the run goes on, and resumes with its scale."""
    calls = []

    def spoilt(sharding, *rest):
        loss = accumulate(sharding, *rest)
        calls.append(rest[5])  # the scale
        if len(calls) == 3:
            sharding.parameters["norm.weight"].grad[0] = torch.inf
        return loss

    flags = ["--dtype", "fp16", "--log-every", "1", "--save-every", "1", "--keep-last", "9"]
    spoiling = partial(steps, accumulate=spoilt)
    assert train("--out", tmp_path / "run", *flags, steps=spoiling) == 0
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scales = [row["loss_scale"] for row in rows if "loss_scale" in row]
    assert scales == calls and scales[2] == 2 * scales[3] and scales[3] == scales[-1]
    past = {n: open_checkpoint(tmp_path / "run", str(n)) for n in (2, 3, 4)}
    weights = {n: p.tensors("model") for n, p in past.items()}
    assert all(torch.equal(x, weights[3][name]) for name, x in weights[2].items())
    assert not all(torch.equal(x, weights[4][name]) for name, x in weights[3].items())
    assert past[4].state["scale"] == {"value": scales[3], "good": 1}

    calls.clear()
    last = rows[-1]["step"]
    assert train("--resume", tmp_path / "run", "--steps", last + 1, steps=spoiling) == 0
    assert calls == [scales[-1]]
