"""What is not a number is refused by name: in logits, in an evaluation, and in JSON."""

import json
import math

import pytest
import torch

from minillm.config.model import ModelConfig
from minillm.config.sampling import EXIT_DEFAULTS, ExitRule
from minillm.errors import DivergedError
from minillm.inference import language_model
from minillm.model.gpt import GPT
from minillm.ops import EAGER
from minillm.runtime import program
from minillm.runtime.json_text import json_text
from minillm.scripts import sample as script
from minillm.training import recurrence_metrics
from minillm.training.evaluate import evaluate
from minillm.training.metrics import jsonable
from minillm.training.reporter import Reporter
from tests.support.generating import generated, speculated

SHAPE = {"vocab_size": 19, "seq_len": 24, "n_head": 2, "d_model": 16, "d_ff": 24}
CORE = {"recurrent": "1,1,1", "mean_recurrence": 3}
BAD = {
    "nan": (math.nan, "1 of the 19 logits are NaN"),
    "inf": (math.inf, "the logits are infinite"),
    "all -inf": (-math.inf, "the logits are infinite"),
}


def model_of(**options) -> GPT:
    config = ModelConfig(**{**SHAPE, "n_layer": 1, **options})
    return GPT(config, EAGER, torch.float32, torch.Generator().manual_seed(1)).eval()


def spoil(model: GPT, value: float, calls: int, row: int = -1) -> None:
    """After so many calls the logits of the last row, or another, hold what is no number."""
    whole, seen = model.logits, []

    def spoilt(x):
        z = whole(x).clone()
        seen.append(z)
        if len(seen) > calls:
            z.view(-1, 19)[row, slice(None) if value == -math.inf else slice(4, 5)] = value
        return z

    model.logits = spoilt


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 3}], ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_that_are_no_numbers_are_refused_with_the_step(value, how, use_cache):
    model, (number, words) = model_of(), BAD[value]
    spoil(model, number, calls=3)
    made = []
    with pytest.raises(DivergedError, match=r"new token 4 of sample 0 \(position 5\)") as refused:
        made.extend(generated(model, [[1, 2]], max_tokens=9, use_cache=use_cache, **how))
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert len(made) == 3 and all(math.isfinite(token.logprob) for token in made)


def test_one_row_of_a_batch_is_named():
    model = model_of()
    spoil(model, math.nan, calls=5, row=1)  # after three prompts, read alone, and two steps
    with pytest.raises(DivergedError, match=r"new token 4 of sample 1 \(position 4\)"):
        list(generated(model, [[1, 2], [3], [4, 5, 6]], max_tokens=9))


@pytest.mark.parametrize("by", EXIT_DEFAULTS)
def test_early_exits_refuse_them_too(by):
    model = model_of(n_layer=3, **CORE)
    spoil(model, math.nan, calls=6)
    with pytest.raises(DivergedError, match="another recurrence or take another checkpoint"):
        list(generated(model, [[1, 2]], max_tokens=20, exit_rule=ExitRule(by, 0.5, 0)))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_speculation_refuses_them_too(temperature):
    model = model_of(n_layer=3, **CORE)
    spoil(model, math.nan, calls=8)
    with pytest.raises(DivergedError, match="new token"):
        list(
            speculated(model, [[1, 2]], draft_recurrence=1, max_tokens=20, temperature=temperature)
        )


def test_weights_that_overflow_are_refused_by_the_script(tiny_run, capsys, monkeypatch):
    """Every weight is finite: what is computed of them is not."""
    found = language_model.load_run

    def large(*args, **options):
        loaded = found(*args, **options)
        loaded[0].head.weight.data.mul_(1e38).mul_(1e3)
        return loaded

    monkeypatch.setattr(language_model, "load_run", large)
    for flags in (["--json"], ["--temperature", "0"], ["--num-samples", "2"]):
        assert program.run("sample.py", script.main, [str(tiny_run), *flags]) == 6
        out, err = capsys.readouterr()
        assert "NaN" not in out and "Infinity" not in out
        assert "error: new token 1 of sample 0" in err.splitlines()[-1]


def test_an_evaluation_names_the_window():
    model = model_of()
    windows = [(torch.full((4,), 1), torch.full((4,), 2)) for _ in range(6)]
    windows[4] = (torch.full((4,), 5), torch.full((4,), 2))
    with torch.no_grad():
        model.embed.weight[5] = math.nan
    for size in (1, 2, 3):
        with pytest.raises(DivergedError, match=f"window {4 // size * size} of 6"):
            evaluate(model, windows, size)
    assert not model.training


def test_training_goes_on_where_an_evaluation_has_no_number(train, tmp_path, monkeypatch, capsys):
    whole = GPT.logits
    monkeypatch.setattr(GPT, "logits", lambda self, x: whole(self, x) * math.nan)  # of samples
    forward = GPT.forward

    def spoilt(self, tokens, targets=None, *rest):
        loss = forward(self, tokens, targets, *rest)
        return loss if self.training else loss * math.nan

    monkeypatch.setattr(GPT, "forward", spoilt)
    assert train("--out", tmp_path / "r", "--sample-every", "4") == 0
    said = capsys.readouterr().err
    assert "warning   step 4: the loss of the validation text is nan" in said
    assert "warning   step 4: no sample: new token 1 of sample 0" in said
    text = (tmp_path / "r" / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"val_loss": null' in text and "NaN" not in text


def test_a_loss_by_recurrence_that_is_no_number_is_an_alarm():
    row = {"val_loss_at_r": {"1": 3.0, "2": 2.0, "4": math.nan, "8": math.inf},
           "token_correlation": 0.1, "state_growth": 1.0}  # fmt: skip
    assert "not finite at 4, 8 iterations" in recurrence_metrics.alarms(row, 2)["not finite"]


def test_json_holds_no_nan(tmp_path):
    odd = {"a": [1.5, math.nan, (math.inf,)], "b": {"c": -math.inf}, "d": True, "e": "NaN"}
    right = {"a": [1.5, None, [None]], "b": {"c": None}, "d": True, "e": "NaN"}
    assert json.loads(json_text(odd), parse_constant=pytest.fail) == right
    assert jsonable(odd) == right
    report = Reporter(tmp_path / "metrics.jsonl", 0, 2, 1.0, 1.0)
    report.row({"step": 1, **odd})
    report.close()
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, **right}
