"""Adaptive exit: thresholds at both ends, rows that leave, and the trap of plain latent exit."""

import pytest
import torch

from minillm.config.sampling import EXIT_DEFAULTS, ExitRule, SamplingParams
from minillm.config.train import ModelConfig
from minillm.errors import UsageError
from minillm.inference.early_exit import read, read_next
from minillm.model.gpt import GPT
from minillm.model.recurrence import state_keys
from minillm.ops import EAGER
from tests.support.broad import broad
from tests.support.generating import generated

SHAPE = {"vocab_size": 31, "seq_len": 24, "n_head": 2, "d_model": 16, "d_ff": 24}
NEVER = {"confidence": 1.0, "kl": 0.0, "latent": 0.0}
ALWAYS = {"confidence": 0.0, "kl": 1e9, "latent": 1e9}
RULES = tuple(EXIT_DEFAULTS)


@pytest.fixture
def model() -> GPT:
    config = ModelConfig(**SHAPE, recurrent="1,2,1", mean_recurrence=4)
    model = GPT(config, EAGER, torch.float32, torch.Generator().manual_seed(3)).eval()
    with torch.no_grad():
        model.head.weight.mul_(4)  # so that distributions differ from token to token
    return model


def text(rows: int = 3, T: int = 12) -> torch.Tensor:
    return (torch.arange(rows * T) * 7 + 3).reshape(rows, T) % 31


@broad("by", RULES, quick=(1,))
@pytest.mark.parametrize("at_once", [True, False])
@torch.no_grad()
def test_a_rule_that_never_holds_is_the_fixed_recurrence(model, by, at_once):
    rule, keys = ExitRule(by, NEVER[by], 0), state_keys(0, torch.arange(3))
    for most in (1, 5, 120):
        plain = model.logits(model.trunk(text(), recurrence=most, keys=keys))
        if at_once:
            logits, steps = read(model, text(), rule, most, keys)
            assert torch.equal(logits, plain) and (steps == most).all()
            continue
        cache = model.make_cache(3, recurrence=most)
        model.trunk(text()[:, :8], cache, most, keys)
        for t in range(8, 12):
            logits, steps = read_next(model, text()[:, t : t + 1], cache, rule, most, keys)
            torch.testing.assert_close(logits, plain[:, t], rtol=1e-4, atol=1e-4)
            assert steps == [most] * 3
        assert cache.lengths == [12] * 3


@pytest.mark.parametrize("by", RULES)
@pytest.mark.parametrize("patience", [0, 2])
@torch.no_grad()
def test_a_rule_that_always_holds_takes_its_patience(model, by, patience):
    """kl needs a second distribution to compare with the first."""
    rule, first = ExitRule(by, ALWAYS[by], patience), patience + 1 + (by == "kl")
    logits, steps = read(model, text(), rule, 9)
    assert (steps == first).all()
    assert torch.equal(logits, model.logits(model.trunk(text(), recurrence=first)))


def sampled(model, prompts, by, **options) -> list[list[tuple[int, int]]]:
    made = [[] for _ in prompts]
    rule = ExitRule(by, {"confidence": 0.3, "kl": 0.02, "latent": 0.5}[by], 1)
    for token in generated(
        model, prompts, max_tokens=24, seed=4, recurrence=9, exit_rule=rule, **options
    ):
        made[token.row].append((token.id, token.recurrence))
    return made


@broad("by", RULES)
@pytest.mark.parametrize("cache", ["full", "slot"])
def test_a_batch_gives_what_each_row_gives_alone(model, by, cache):
    """Tokens and iterations; rows leave the core at different times, and some early. Beyond the
    context's end, too, which they reach one after the other."""
    prompts = [[1, 2, 3, 4, 5], [7], [3, 4, 9, 30, 2, 2, 8]]
    together = sampled(model, prompts, by, recurrent_cache=cache)
    for i, prompt in enumerate(prompts):
        alone = sampled(model, [prompt], by, samples=[i], recurrent_cache=cache)
        assert alone == [together[i]]
    used = {steps for row in together for _, steps in row[1:]}
    assert len(used) > 1 and min(used) < 9


@torch.no_grad()
def test_rows_that_have_left_are_not_computed(model, monkeypatch):
    """One row never leaves: from the others' exit on, the core sees one row."""
    sizes, plain = [], GPT._iteration

    def counted(self, s, *rest):
        sizes.append(len(s))
        return plain(self, s, *rest)

    monkeypatch.setattr(GPT, "_iteration", counted)
    rule = ExitRule("confidence", 0.3, 0)
    keys = state_keys(0, torch.arange(6))
    _, steps = read(model, text(6), rule, 9, keys)
    last = steps.amax(1)
    assert sizes == [int((last > i).sum()) for i in range(int(last.max()))]
    sizes.clear()
    cache = model.make_cache(6, recurrence=9)
    model.trunk(text(6)[:, :8], cache, 9, keys)
    sizes.clear()
    _, used = read_next(model, text(6)[:, 8:9], cache, rule, 9, keys)
    assert sizes == [sum(u > i for u in used) for i in range(max(used))]


@pytest.mark.parametrize("by", RULES)
@torch.no_grad()
def test_by_the_state_only_what_leaves_is_spoken(model, monkeypatch, by):
    """Coda and head run on it alone; the other rules hear every token in every iteration."""
    rows, heads, run, head = [], [], GPT.run, GPT.logits

    def counted(self, layers, x, *rest):
        if layers.start == 3:
            rows.append(len(x))
        return run(self, layers, x, *rest)

    def spoken(self, x):
        heads.append(len(x))
        return head(self, x)

    rule = ExitRule(by, {"confidence": 0.6, "kl": 0.1, "latent": 0.3}[by], 0)
    keys = state_keys(0, torch.arange(6))
    cache = model.make_cache(6, recurrence=9)
    model.trunk(text(6)[:, :8], cache, 9, keys)
    monkeypatch.setattr(GPT, "run", counted)
    monkeypatch.setattr(GPT, "logits", spoken)
    _, used = read_next(model, text(6)[:, 8:9], cache, rule, 9, keys)
    assert len(set(used)) > 1 and heads == rows
    inside = [sum(u > i for u in used) for i in range(max(used))]
    assert rows == ([used.count(i) for i in sorted(set(used))] if by == "latent" else inside)
    rows.clear()
    heads.clear()
    _, steps = read(model, text(6), rule, 9, keys)
    some = {int(i) for i in steps.unique()}
    assert len(some) < steps.max() or by != "latent"
    assert len(rows) == len(heads) == (len(some) if by == "latent" else int(steps.max()))


@torch.no_grad()
def test_later_iterations_find_the_entries_of_the_last(model):
    """Of a token that left after two iterations, in a cache of five."""
    cache = model.make_cache(1, recurrence=5)
    model.trunk(text(1)[:, :4], cache, 5)
    read_next(
        model,
        text(1)[:, 4:5],
        cache,
        ExitRule("confidence", 0.0, 1),
        5,
        torch.zeros(1, dtype=torch.int64),
    )
    for block in (1, 2):
        held = [cache.k[cache.slot(block, i), 0, 4] for i in range(5)]
        assert not torch.equal(held[0], held[1])
        assert all(torch.equal(held[1], later) for later in held[2:])


@pytest.mark.parametrize("by", ["kl", "latent"])
def test_none_goes_before_those_it_may_wait_for(model, by):
    """At once: iterations never fall along a row."""
    rule = ExitRule(by, {"kl": 0.02, "latent": 0.5}[by], 0)
    _, steps = read(model, text(), rule, 9)
    assert (steps.diff(dim=1) >= 0).all() and len(steps.unique()) > 1


def exit_rule(by, threshold, patience) -> ExitRule | None:
    return SamplingParams(exit_by=by, exit_threshold=threshold, exit_patience=patience).exit_rule


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("moth", None, None), "exit_by 'moth' is not one of confidence, kl, latent"),
        (("confidence", 1.5, None), "exit_threshold 1.5: .* expected 0 to 1"),
        (("kl", float("nan"), None), "exit_threshold nan .* expected at least 0"),
        (("kl", float("inf"), None), "exit_threshold inf: expected a finite number"),
        (("latent", None, -1), "exit_patience -1 .* between 0 and 4096"),
        (("latent", None, 10**20), "exit_patience 1[0]* .* between 0 and 4096"),
        ((None, 0.5, None), "exit_threshold needs exit_by"),
        ((None, None, 2), "exit_patience needs exit_by"),
    ],
)
def test_wrong_rules_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        exit_rule(*words)
    assert exit_rule(None, None, None) is None
    assert exit_rule("confidence", None, None) == ExitRule("confidence", 0.9, 3)
    assert exit_rule("kl", 0.5, 0) == ExitRule("kl", 0.5, 0)


def test_a_rule_without_a_core_is_refused(model):
    rule = ExitRule("confidence", 0.9, 0)
    plain = GPT(ModelConfig(**SHAPE, n_layer=1), EAGER)
    for these, options, words in (
        (plain, {}, "exit_by: this model has no core"),
        (model, {"use_cache": False}, "exit_by: needs use_cache=True"),
    ):
        with pytest.raises(UsageError, match=words):
            list(generated(these, [[1]], exit_rule=rule, **options))
