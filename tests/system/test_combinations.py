"""Arguments that cannot be had together are refused; none is passed over in silence."""

import pytest
import torch

from minillm.config.sampling import ExitRule
from minillm.config.train import ModelConfig
from minillm.errors import UsageError
from minillm.inference.early_exit import read, read_next
from minillm.model.gpt import GPT
from minillm.model.recurrence import state_keys
from minillm.ops import EAGER
from minillm.runtime import program
from minillm.scripts import sample as script
from tests.support.generating import generated, speculated

SHAPE = {"vocab_size": 31, "seq_len": 16, "n_head": 2, "d_model": 16, "d_ff": 24}
CORE = {"recurrent": "1,1,1", "mean_recurrence": 3}
TEXT = torch.tensor([[0, 5, 9, 2, 7, 4], [0, 8, 4, 4, 1, 3]])  # 0 begins a document
NEVER = ExitRule("latent", 0.0, 0)


def model_of(**options) -> GPT:
    shape = SHAPE | ({} if "recurrent" in options else {"n_layer": 1})
    config = ModelConfig(**{**shape, **options})
    return GPT(config, EAGER, torch.float32, torch.Generator().manual_seed(5)).eval()


@torch.no_grad()
def test_a_cache_refuses_a_second_document():
    """A row's first token may begin its only document; without a mask tokens are but tokens."""
    model, two = model_of(document_mask=True, bos_id=0), TEXT.clone()
    two[1, 3] = 0
    right = model.trunk(TEXT)
    cache = model.make_cache(2)
    parts = [model.trunk(part, cache) for part in TEXT.split((4, 1, 1), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), right)
    for held in (0, 2):
        cache = model.make_cache(2)
        if held:
            model.trunk(two[:, :held], cache)
        with pytest.raises(ValueError, match="document_mask does not work with a cache"):
            model.trunk(two[:, held:], cache)
        assert cache.lengths == [held] * 2
    with pytest.raises(ValueError, match="another document"):  # after a cut, too
        model.trunk(torch.tensor([[0], [3]]), cache)
    plain = model_of()
    plain.trunk(two, plain.make_cache(2))


@pytest.mark.parametrize("kept", [4, None], ids=["full", "slot"])
@torch.no_grad()
def test_a_cache_refuses_more_iterations_than_it_has_keys_of(kept):
    model, keys = model_of(**CORE), state_keys(0, torch.arange(2))
    cache = model.make_cache(2, recurrence=kept)
    model.trunk(TEXT[:, :3], cache, 2, keys)
    if kept is None:  # the keys of the last iteration are there whatever the recurrence is
        model.trunk(TEXT[:, 3:4], cache, 4, keys)
        return
    for tokens in (TEXT[:, 3:4], TEXT[:, 3:]):
        with pytest.raises(ValueError, match="recurrence 4: the cache has keys and values of 2"):
            model.trunk(tokens, cache, 4, keys)
    with pytest.raises(ValueError, match="recurrence 3: the cache"):
        read_next(model, TEXT[:, 3:4], cache, NEVER, 3, keys)
    model.trunk(TEXT[:, 3:4], cache, 1, keys)  # fewer are there
    with pytest.raises(ValueError, match="recurrence 2: the cache has keys and values of 1"):
        model.trunk(TEXT[:, 4:5], cache, 2, keys)
    assert not cache.k[cache.slot(1, 3)].any()  # what would have been read
    cache.keep_rows([1])
    assert cache.reached == [1]
    again = cache.row_view(0)
    model.trunk(TEXT[1:], again, 4, keys[1:])
    cache.update_row(0, again)
    model.trunk(TEXT[1:, :1], cache, 4, keys[1:])


def refusals() -> dict:
    flat, core = model_of(), model_of(**CORE)
    keys, both = state_keys(0, torch.arange(2)), [[1, 2], [3]]
    dropping = model_of(dropout=0.1).train()

    def tried(model, prompts=both, **options):
        return lambda: list(generated(model, prompts, max_tokens=2, **options))

    return {
        "another batch": (lambda: flat.trunk(TEXT[:1], flat.make_cache(2)), "1 rows .* has 2"),
        "one key": (lambda: core.trunk(TEXT, keys=keys[:1]), r"keys are \(1,\); expected \(2,\)"),
        "targets": (lambda: flat(TEXT, TEXT.T), r"targets are \(6, 2\); expected \(2, 6\)"),
        "readings falling": (lambda: list(core.readings(TEXT, [4, 2])), "above the one before"),
        "readings of 0": (lambda: list(core.readings(TEXT, [0])), "recurrence 0"),
        "readings, flat": (lambda: list(flat.readings(TEXT, [1])), "no core"),
        "read, flat": (lambda: read(flat, TEXT, NEVER, 3), "no core"),
        "read 0 times": (lambda: read(core, TEXT, NEVER, 0), "recurrence 0"),
        "next, two": (
            lambda: read_next(core, TEXT, core.make_cache(2, recurrence=3), NEVER, 3, keys),
            "one of each row",
        ),
        "cache, flat": (lambda: flat.make_cache(1, recurrence=2), "no core"),
        "warm, flat": (lambda: flat.make_cache(1, warm=True), "no core"),
        "cache of 0": (lambda: core.make_cache(1, recurrence=0), "recurrence 0"),
        "capacity of 0": (lambda: core.make_cache(1, capacity=0), "capacity 0"),
        "slot, no cache": (
            tried(core, recurrent_cache="slot", use_cache=False), "recurrent_cache: needs use_",
        ),
        "samples": (tried(flat, samples=[1]), "1 samples for 2 prompts"),
        "dropout": (tried(dropping), "call model.eval"),
        "speculated samples": (
            lambda: list(speculated(core, both, draft_recurrence=1, samples=[0])),
            "1 samples for 2 prompts",
        ),
    }  # fmt: skip


REFUSALS = refusals()


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_together(name):
    act, words = REFUSALS[name]
    with pytest.raises(ValueError, match=words) as refused, torch.no_grad():
        act()
    assert "\n" not in str(refused.value)


@torch.no_grad()
def test_padding_is_no_target():
    model, mask = model_of(), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    right = TEXT.clone()
    right[1, 4:] = -100
    assert model(TEXT, TEXT, attention_mask=mask) == model(TEXT, right, attention_mask=mask)


@pytest.mark.parametrize("flags, words", [
    (["--warm-start"], "--warm-start: this model has no core"),
    (["--exit-by", "kl", "--warm-start"], "--exit-by, --warm-start: this model"),
    (["--exit-patience", "2"], "--exit-patience needs --exit-by"),
    (["--exit-by", "kl", "--draft-recurrence", "2"], "without --exit-by; drop one"),
])  # fmt: skip
def test_flags_that_do_nothing_are_refused(tiny_run, flags, words, capsys):
    assert program.run("sample.py", script.main, [str(tiny_run), *flags]) == UsageError.code
    assert words in capsys.readouterr().err.splitlines()[-1]
