"""Recurrent depth in train.py and sample.py: draws, resumption, what is reported and refused."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from minillm.checkpoint.find import open_checkpoint
from minillm.config.train import ModelConfig, TrainConfig
from minillm.distributed.ranks import Ranks
from minillm.distributed.strategies import shard
from minillm.model.gpt import GPT
from minillm.model.recurrence import draw, state_keys
from minillm.model.size import flops_per_token
from minillm.ops import EAGER
from minillm.runtime import device as world, program
from minillm.scripts import sample
from minillm.training import recurrence_metrics, steps as training_steps, validation
from minillm.training.gradients import accumulate
from minillm.training.reporter import Reporter
from minillm.training.setup import compiled
from minillm.training.steps import draw_recurrences, mean_flops, steps
from tests.support.broad import broad

FLAGS = ("--recurrent", "1,1,1", "--mean-recurrence", "3", "--recurrence-groups", "2")
QUIET = ("--val-fraction", "0")  # evaluations, at five recurrences each, take most of the time


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_gradients_do_not_depend_on_the_micro_batch():
    """Groups of sequences of their own recurrence, whole or one sequence at a time; in fp64."""
    shape = {"vocab_size": 13, "seq_len": 8, "n_head": 2, "d_model": 16, "recurrent": "1,1,1"}
    model = GPT(ModelConfig(**shape), EAGER, torch.float64).double()
    tokens, targets = torch.randint(13, (2, 6, 8), generator=torch.Generator().manual_seed(0))
    targets[2:, 4:] = -100  # 8, 8, 4, 4, 4, 4 of 32: shares that fp32 has exactly
    keys, rounds, found = state_keys(3, torch.arange(6)), [1, 4, 2], []
    for micro in (6, 2, 1):
        model.zero_grad()
        loss = accumulate(shard(model, [], Ranks()), tokens, targets, keys, micro, rounds)
        found.append([loss.double(), *(p.grad.clone() for p in model.parameters())])
    model.zero_grad()
    total = 0.0
    for i in range(6):  # by hand: sequence i is of group i modulo three
        x, y, k = (t[i : i + 1] for t in (tokens, targets, keys))
        total = total + model(x, y, rounds[i % 3], k) * (y != -100).sum() / (targets != -100).sum()
    total.backward()
    truth = [total.detach().double(), *(p.grad for p in model.parameters())]
    for results in found:
        torch.testing.assert_close(results, truth, rtol=1e-6, atol=1e-9)


@broad("more", [(), ("--recurrence-curriculum", "--backprop-depth", "2")], quick=(1,), ids=str)
def test_a_resumed_run_draws_and_learns_the_same(train, tmp_path, more):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert train("--out", straight, "--save-every", "4", "--keep-last", "9", *FLAGS, *more) == 0
    shutil.copytree(straight, broken)
    shutil.rmtree(broken / "checkpoints" / "step-00000008")
    assert open_checkpoint(broken).step == 4
    assert train("--resume", broken) == 0
    for key in ("recurrence", "loss", "val_loss_at_r"):
        ours, theirs = ([r.get(key) for r in rows(run) if "tokens_per_s" in r or key in r]
                        for run in (broken, straight))  # fmt: skip
        assert ours == theirs and any(ours), key
    for step in (4, 8):
        name = f"checkpoints/step-{step:08d}/model-00001-of-00001.safetensors"
        assert (straight / name).read_bytes() == (broken / name).read_bytes()


def test_draws_are_the_published_function_of_the_step(train, tmp_path):
    """Whatever the micro-batch: the mean of the groups' draws stands in each row."""
    for micro in ("1", "2", "4"):
        assert train("--out", tmp_path / micro, "--micro-batch-size", micro, *FLAGS, *QUIET) == 0
        told = [row["recurrence"] for row in rows(tmp_path / micro) if "recurrence" in row]
        assert told == [sum(draw(1337, step, 2, 3, 12)) / 2 for step in range(8)]
    assert len(set(told)) > 2


def test_start_states_are_a_function_of_seed_and_sample(train, tmp_path):
    """The samples are numbered over all steps, also where a run is resumed."""
    seen = []

    def noted(sharding, tokens, targets, keys, *rest):
        seen.append(keys.tolist())
        return accumulate(sharding, tokens, targets, keys, *rest)

    run, noting = tmp_path / "run", partial(steps, accumulate=noted)
    assert train("--out", run, "--steps", "3", "--seed", "5", *FLAGS, *QUIET, steps=noting) == 0
    assert train("--resume", run, "--steps", "5", steps=noting) == 0
    assert seen == [state_keys(5, torch.arange(4 * s, 4 * s + 4)).tolist() for s in range(5)]


def test_the_curriculum_takes_a_quarter(monkeypatch):
    """From 1 to the mean, linearly in the share of the run; without it the mean all along."""
    monkeypatch.setattr(training_steps, "draw", lambda seed, step, groups, mean, most: mean)
    shape = ModelConfig(vocab_size=13, n_head=2, d_model=16, recurrent="1,1,1", mean_recurrence=9)

    def mean_at(step: int, curriculum: bool) -> float:
        config = TrainConfig(recurrence_curriculum=curriculum)
        return draw_recurrences(config, shape, step, step / 100)

    assert [mean_at(step, True) for step in (0, 5, 20, 25, 26, 99)] == pytest.approx(
        [1, 1 + 8 / 5, 1 + 8 * 4 / 5, 9, 9, 9]
    )
    assert [mean_at(step, False) for step in (0, 20, 99)] == [9, 9, 9]


def test_what_is_reported(train, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(recurrence_metrics, "LEAST_GAIN", 99.0)
    monkeypatch.setattr(validation, "GROWN", 0)
    assert train("--out", tmp_path / "run", *FLAGS) == 0
    err = capfd.readouterr().err
    assert "1 + 1 x 3 (up to 12) + 1 layers of 16" in err
    assert err.count("the recurrence is hardly used") == 1  # and not at every evaluation
    (first, last) = (row for row in rows(tmp_path / "run") if "val_loss_at_r" in row)
    for row in (first, last):
        assert list(row["val_loss_at_r"]) == ["1", "2", "3", "6", "12"]
        assert row["val_loss_at_r"]["3"] == row["val_loss"]
        assert 0 <= row["token_correlation"] <= 1 and 0.9 < row["state_growth"] < 1.1


def test_flops_follow_the_draws():
    shape = ModelConfig(vocab_size=13, seq_len=8, n_head=2, d_model=16, recurrent="1,1,1",
                        mean_recurrence=4, backprop_depth=2)  # fmt: skip
    each = [flops_per_token(shape, r) for r in (1, 5)]
    assert mean_flops(shape, [1, 5]) == sum(each) / 2 and each[1] > 1.5 * each[0]
    plain = ModelConfig(vocab_size=13, seq_len=8, n_head=2, d_model=16, n_layer=2)
    assert mean_flops(plain, [None]) == flops_per_token(plain)


# The alarms.


def test_evaluated_recurrences():
    found = [recurrence_metrics.evaluated_recurrences(mean) for mean in (1, 6, 8)]
    assert found == [[1, 2, 4], [1, 2, 4, 6, 12, 24], [1, 2, 4, 8, 16, 32]]


def test_correlation():
    numbers = torch.Generator().manual_seed(0)
    apart = torch.randn(3, 50, 400, generator=numbers)
    assert abs(recurrence_metrics.correlation(apart)) < 0.01
    alike = torch.randn(3, 1, 400, generator=numbers).expand(3, 50, 400)
    assert recurrence_metrics.correlation(alike) == pytest.approx(1, abs=1e-4)
    assert 0.4 < recurrence_metrics.correlation(alike + apart) < 0.6


def test_alarms():
    sound = {"val_loss_at_r": {"1": 3.0, "4": 2.5}, "token_correlation": 0.3, "state_growth": 1.0}
    assert recurrence_metrics.alarms(sound, 4) == {}
    for change, kind, words in (
        ({"token_correlation": 0.95}, "collapsed", "has collapsed"),
        ({"val_loss_at_r": {"1": 3.0, "4": 2.99}}, "ignored", "hardly used"),
        ({"state_growth": 40.0}, "growing", "grows 40.0 times from 4 to 16"),
    ):
        alarms = recurrence_metrics.alarms({**sound, **change}, 4)
        assert list(alarms) == [kind] and words in alarms[kind]


def test_losses_by_recurrence_are_of_the_windows_of_the_evaluation():
    """Their differences are measured on a part of it; the one at the mean is the evaluation's."""
    found = {"val_loss_at_r": {"1": 3.5, "4": 3.0, "8": 2.75}, "state_growth": 1.0}
    moved = recurrence_metrics.anchored(found, 4, 3.3)
    assert moved["val_loss_at_r"]["4"] == 3.3 and moved["state_growth"] == 1.0
    assert moved["val_loss_at_r"] == pytest.approx({"1": 3.8, "4": 3.3, "8": 3.05})
    assert recurrence_metrics.anchored({}, 4, 3.3) == {}
    line = recurrence_metrics.line({"val_loss_at_r": {"1": 3.8, "4": 3.3, "8": 3.05}}, 4)
    assert line == "loss at r 1: 3.800  4: 3.300 (mean)  8: 3.050"


def told(step: int, row: dict, tokens: int = 0, report: Reporter | None = None) -> list[str]:
    """The warnings after `step` of 100 steps of a model of ten parameters."""
    setup = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(mean_recurrence=4)))
    progress, schedule = SimpleNamespace(step=step, tokens=tokens), SimpleNamespace(steps=100)
    state = SimpleNamespace(progress=progress, schedule=schedule)
    report, lines = report or Reporter(None, 0, 100, 1.0, 1.0), []
    report.say = lines.append
    with mock.patch.object(validation, "n_parameters", lambda config: 10):
        validation.report_row(setup, state, report, row)
    assert not lines or lines[0].startswith("loss at r 1: 3.000")
    return lines[1:]


def test_alarms_are_silent_in_the_first_tenth():
    row = {"val_loss_at_r": {"1": 3.0, "4": 2.5}, "token_correlation": 0.95, "state_growth": 1.0}
    assert told(1, row) == told(9, row) == told(50, {"val_loss": 3.0}) == []
    report = Reporter(None, 0, 100, 1.0, 1.0)
    for step in (10, 50, 100):
        (line,) = told(step, row)
        assert line.startswith("warning") and "has collapsed" in line
        assert len(told(step, row, report=report)) == (step == 10)  # once in a run


def test_that_recurrence_is_hardly_used_is_said_of_grown_models_alone():
    row = {"val_loss_at_r": {"1": 3.0, "4": 3.0}, "token_correlation": 0.1, "state_growth": 1.0}
    assert told(49, row, 10**6) == told(100, row, 29) == []
    for step, tokens in ((50, 30), (100, 30), (100, 10**6)):
        (line,) = told(step, row, tokens)
        assert "hardly used" in line


# Wrong input.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--recurrent", "0,0,0"), "is not PRELUDE,CORE,CODA"),
        (("--recurrent", "1,1"), "is not PRELUDE,CORE,CODA"),
        (("--recurrent", "1,1,1", "--mean-recurrence", "0"), "--mean-recurrence"),
        (("--recurrent", "1,1,1", "--max-recurrence", "3"), "--max-recurrence 3 is below"),
        (("--recurrent", "1,1,1", "--recurrence-groups", "3"), "does not divide --batch-size"),
        (("--recurrent", "1,1,1", "--norm", "layernorm"), "needs --norm rmsnorm"),
        (("--recurrent", "1,1,1", "--recurrence-style", "moth"), "not one of huginn, parcae"),
        (("--recurrent", "1,9999,1"), "is 10001 blocks; at most 10000"),
        (("--recurrent", "1,1,1", "--n-layer", "7"), "has 3 blocks; leave it out"),
        (("--mean-recurrence", "5"), "--mean-recurrence needs a recurrent model; add --recurrent"),
        (("--injection", "add"), "--injection needs a recurrent model"),
    ],
)
def test_train_refuses_in_a_line(train, tmp_path, capfd, flags, words):
    assert train("--out", tmp_path / "run", *flags) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line


@pytest.fixture(scope="module")
def recurrent_run(train, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "recurrent"
    assert train("--out", run, "--steps", "3", *FLAGS) == 0
    return run


def sampled(capfd, *words) -> tuple[int, str, str]:
    code = program.run("sample.py", sample.main, [*map(str, words), "--max-tokens", "9"])
    said = capfd.readouterr()
    return code, said.out, said.err


def test_sample_at_a_recurrence(recurrent_run, capfd):
    texts = []
    for flags in ((), ("--recurrence", "3"), ("--recurrence", "1"),
                  ("--recurrence", "7", "--recurrent-cache", "slot")):  # fmt: skip
        code, out, _ = sampled(capfd, recurrent_run, "--temperature", "2", *flags)
        assert code == 0
        texts.append(out)
    assert texts[0] == texts[1] != texts[2]
    drafted = sampled(capfd, recurrent_run, "--temperature", "2", "--draft-recurrence", "1")
    assert drafted[:2] == (0, texts[0])
    _, out, _ = sampled(capfd, recurrent_run, "--exit-by", "latent", "--exit-threshold", "9",
                        "--exit-patience", "0", "--json")  # fmt: skip
    used = json.loads(out)["recurrences"]
    assert used[0] == 3 and set(used[1:]) == {1}  # the prompt is read at the full recurrence


def test_an_exit_rule_needs_the_cache_twice(recurrent_run, capfd, monkeypatch):
    """Rows that stay in the core while others leave are copied: seven iterations of one block, and
    two more blocks, of 16 positions of keys and values of 16 numbers in fp32."""
    once = 2 * (1 + 7 + 1) * 16 * 16 * 4
    for free, flags, expected in (
        (3 * once, (), 0), (3 * once - 1, (), 4), (6 * once, ("--exit-by", "kl"), 0),
        (6 * once - 1, ("--exit-by", "kl"), 4),
    ):  # fmt: skip
        monkeypatch.setattr(world, "available_memory", lambda device, free=free: free)
        flags = ("--num-samples", "3", "--recurrence", "7", *flags)
        code, _, err = sampled(capfd, recurrent_run, *flags)
        assert code == expected, err
        assert ("at most 2 fit" in err) == (expected == 4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--recurrence", "0"), "out of range"),
        (("--recurrence", "-1"), "out of range"),
        (("--recurrence", "1000000000"), "expected between 1 and 4096"),
        (("--recurrent-cache", "half"), "half"),
        (("--draft-recurrence", "3"), "--draft-recurrence 3: expected less than --recurrence 3"),
        (("--recurrence", "1", "--draft-recurrence", "1"), "less than --recurrence 1, or leave"),
        (("--exit-by", "kl", "--exit-patience", "9" * 20), "expected between 0 and 4096"),
        (
            ("--draft-recurrence", "1", "--exit-by", "kl"),
            "--draft-recurrence: speculative decoding works without --exit-by",
        ),
        (("--exit-threshold", "0.5"), "--exit-threshold needs --exit-by"),
        (
            ("--exit-by", "confidence", "--exit-threshold", "2"),
            "--exit-threshold 2: a confidence is a probability",
        ),
    ],
)
def test_sample_refuses_in_a_line(recurrent_run, capfd, flags, words):
    code, _, err = sampled(capfd, recurrent_run, *flags)
    assert code == 2 and words in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize(
    "flags", [("--recurrence", "2"), ("--exit-by", "kl"), ("--draft-recurrence", "1")], ids=str
)
def test_a_model_without_a_core_has_no_recurrence(tiny_run, capfd, flags):
    code, _, err = sampled(capfd, tiny_run, *flags)
    last = err.splitlines()[-1]
    assert code == 2 and ("no core to run again" in last or "of recurrent models" in last)


@pytest.mark.parametrize("depth, most", [(16, 4), (2, 6)])
def test_a_core_is_compiled_once_however_often_it_runs(monkeypatch, depth, most):
    """A graph a block; one more of those of the core, for iterations without gradients."""
    counter, plain_compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda m: plain_compile(m, backend=counter))
    torch._dynamo.reset()
    shape = {"vocab_size": 31, "seq_len": 8, "n_head": 2, "d_model": 16, "backprop_depth": depth}
    config = ModelConfig(**shape, recurrent="1,2,1", mean_recurrence=4)
    plain = GPT(config, EAGER, torch.float32, torch.Generator().manual_seed(0))
    model = GPT(config, EAGER, torch.float32, torch.Generator().manual_seed(0))
    forward, tokens = compiled(model, True), torch.arange(16).reshape(2, 8)
    counts = []
    for r in (3, 5, 9):
        loss = forward(tokens, tokens, r)
        torch.testing.assert_close(loss, plain(tokens, tokens, r))
        loss.backward()
        counts.append(counter.frame_count)
    assert 0 < counts[0] == counts[-1] <= most
