"""Generation: with a cache or without, in a batch or alone, within seq_len and beyond it."""

import math
import time

import pytest
import torch

from minillm.config.model import POSITIONS, ModelConfig
from minillm.errors import UsageError
from minillm.inference.draw import penalise
from minillm.model.gpt import GPT
from minillm.model.kv_cache import KVCache
from minillm.ops import EAGER, REFERENCE
from tests.support.broad import broad
from tests.support.generating import generated

SHAPE = {"vocab_size": 40, "seq_len": 16, "n_layer": 2, "n_head": 4, "d_model": 32, "d_ff": 64}
GREEDY, SAMPLED = {"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}


def make_model(**settings) -> GPT:
    """A random model that is never sure of the next token and looks far back."""
    generator = torch.Generator().manual_seed(5)
    model = GPT(ModelConfig(**{**SHAPE, **settings}), EAGER, generator=generator).eval()
    with torch.no_grad():
        for w in model.parameters():
            if w.dim() == 2:
                w.normal_(0, 2 / math.sqrt(w.shape[1]), generator=generator)
    return model.requires_grad_(False)


def rows(model, prompts, **options) -> list[list[int]]:
    """The new tokens of each prompt."""
    made = [[] for _ in prompts]
    for token in generated(model, prompts, **options):
        made[token.row].append(token.id)
    return made


VARIANTS = [
    *({"position": position} for position in POSITIONS),
    *({"position": position, "window": 5} for position in POSITIONS),
    {"n_kv_head": 2},
    {"n_kv_head": 1, "position": "alibi"},
    {"qk_norm": True, "bias": True, "norm": "layernorm", "mlp": "gelu"},
    {"logit_softcap": 5.0, "tie_embeddings": True},
    {"seq_len": 1},
    {"seq_len": 2, "position": "learned"},
]


@broad("options", [GREEDY, SAMPLED], quick=(1,), ids=["greedy", "sampled"])
@broad("variant", VARIANTS, quick=(0, 3, 5, 8, 9, 10, 11), ids=str)
def test_a_cache_changes_no_token(variant, options):
    model = make_model(**variant)
    prompts = [[1, 2, 3], [7] * 11, [4], list(range(25))]  # the last is longer than seq_len
    cached = rows(model, prompts, max_tokens=45, **options)
    assert cached == rows(model, prompts, max_tokens=45, use_cache=False, **options)
    assert [len(row) for row in cached] == [45] * 4


@pytest.mark.parametrize("position", POSITIONS)
def test_a_broken_cache_is_seen_by_these_tests(position, monkeypatch):
    model = make_model(position=position)
    right = rows(model, [[1, 2, 3]], max_tokens=12, **SAMPLED)
    whole = KVCache.write

    def forgetful(self, layer, k, v):
        k, v = whole(self, layer, k, v)
        v[:, 0] = 0
        return k, v

    monkeypatch.setattr(KVCache, "write", forgetful)
    assert rows(model, [[1, 2, 3]], max_tokens=12, **SAMPLED) != right
    assert rows(model, [[1, 2, 3]], max_tokens=12, use_cache=False, **SAMPLED) == right


@pytest.mark.parametrize("position", ["rope", "learned", "alibi"])
@broad("length", [1, 9, 16, 17, 40], quick=(2, 4))
def test_beyond_seq_len_the_context_is_cut_to_its_last_half(position, length):
    model = make_model(position=position)
    T = model.config.seq_len
    half = T // 2
    prompt = [(7 * i) % 40 for i in range(length)]
    text = list(prompt)
    # The length at which the context is cut for the first time, and every how many tokens after.
    first, period = max(T + 1, length), T - half + 1
    for made in range(50):
        read = len(text) if len(text) < first else half + (len(text) - first) % period
        logits = model(torch.tensor([text[-read:]]))[:, -1]
        u = REFERENCE.uniform(3, torch.tensor([0]), torch.tensor([made]))
        text.append(int(REFERENCE.sample(logits, u, temperature=1.0, top_p=0.9)))
    assert rows(model, [prompt], max_tokens=50, **SAMPLED) == [text[length:]]
    assert len(set(text[length:])) > 5


def test_a_batch_is_its_rows_one_by_one():
    model = make_model()
    prompts = [[1, 2, 3], [9], list(range(14)), [1, 2, 3], list(range(30))]
    options = {"max_tokens": 40, **SAMPLED}
    samples = [0, 1, 2, 5, 7]

    def stop(row, made):
        return sum(made) % 11 == 0

    together = rows(model, prompts, samples=samples, stop=stop, **options)
    alone = [
        rows(model, [prompt], samples=[sample], stop=stop, **options)[0]
        for prompt, sample in zip(prompts, samples, strict=True)
    ]
    assert together == alone
    assert len({len(row) for row in alone}) > 2  # they did end at different times
    assert together[0] != together[3]  # the same prompt, another sample


def test_the_seed_decides_the_text():
    model = make_model()
    texts = [
        rows(model, [[1, 2]], max_tokens=12, temperature=1.0, seed=seed)[0]
        for seed in (0, 1, 2, 2**63 - 1)
    ]
    assert texts[0] == rows(model, [[1, 2]], max_tokens=12, temperature=1.0, seed=0)[0]
    assert len({tuple(text) for text in texts}) == 4


def test_stop_is_asked_after_each_token_and_ends_its_row():
    asked = []

    def stop(row, made):
        asked.append((row, list(made)))
        return len(made) == 3 - row

    made = rows(make_model(), [[1], [2]], max_tokens=9, stop=stop, **GREEDY)
    assert [len(row) for row in made] == [3, 2]
    assert [entry for entry in asked if entry[0] == 0] == [(0, made[0][:n]) for n in (1, 2, 3)]


def test_a_mask_limits_the_tokens_that_may_come_next():
    model, asked = make_model(), []

    def first(row, new):
        asked.append((row, list(new)))
        return torch.isin(torch.arange(40), torch.tensor([11, 12])) if not new else None

    free = rows(model, [[5, 6]], max_tokens=6, **SAMPLED)[0]
    bound = rows(model, [[5, 6]], max_tokens=6, mask=first, **SAMPLED)[0]
    assert free[0] not in (11, 12) and bound[0] in (11, 12)
    assert set(bound[1:]) - {11, 12}
    assert asked == [(0, bound[:n]) for n in range(6)]
    even = torch.arange(40) % 2 == 0
    some = rows(model, [[5], [6]], max_tokens=9, mask=lambda row, new: even if row else None)
    assert any(token % 2 for token in some[0]) and not any(token % 2 for token in some[1])


def test_penalise_against_the_formula():
    logits = torch.tensor([[2.0, -1.0, 0.0, 4.0], [1.0, 1.0, -3.0, 2.0]])
    penalised = penalise(logits, [[0, 1, 0], [2]], 2.0)
    assert penalised.tolist() == [[1.0, -2.0, 0.0, 4.0], [1.0, 1.0, -6.0, 2.0]]
    assert logits[0, 0] == 2.0  # not in place


def test_the_penalty_counts_prompt_and_text():
    model = make_model()
    text = [1, 2, 3]
    for _ in range(12):
        z = model(torch.tensor([text]))[0, -1].tolist()
        for t in set(text):
            z[t] = z[t] / 1.5 if z[t] > 0 else z[t] * 1.5
        text.append(z.index(max(z)))
    made = rows(model, [[1, 2, 3]], max_tokens=12, repetition_penalty=1.5, **GREEDY)[0]
    assert made == text[3:]
    assert made != rows(model, [[1, 2, 3]], max_tokens=12, **GREEDY)[0]


def test_logprobs_are_the_models_own():
    model = make_model()
    text = [1, 2, 3]
    filters = {"temperature": 0.5, "top_k": 3, "top_p": 0.8, "min_p": 0.1, "seed": 1}
    for token in generated(model, [text], max_tokens=10, repetition_penalty=1.3, **filters):
        expected = model(torch.tensor([text])).double()[0, -1].log_softmax(-1)[token.id]
        assert token.logprob == pytest.approx(float(expected), rel=1e-5)
        text.append(token.id)


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "no prompt to continue"),
        ([[1], []], {}, "prompt 1 has no token"),
        ([[1, 40]], {}, "prompt 0 holds token 40; the model knows 0 to 39"),
        ([[-1]], {}, "prompt 0 holds token -1"),
        ([[1]], {"max_tokens": 0}, "max_tokens 0 is out of range; expected between 1"),
        ([[1]], {"temperature": -0.1}, "temperature -0.1 .* expected at least 0"),
        ([[1]], {"temperature": math.nan}, "temperature nan"),
        ([[1]], {"top_k": -1}, "top_k -1"),
        ([[1]], {"top_p": 0.0}, "top_p 0.0: expected above 0"),
        ([[1]], {"min_p": 1.5}, "min_p 1.5 .* expected between 0 and 1"),
        (
            [[1]],
            {"repetition_penalty": 0.0},
            "repetition_penalty 0.0 .* expected between 0.01 and 100",
        ),
    ],
)
def test_refusals(prompts, options, message):
    with pytest.raises(UsageError, match=message):
        list(generated(make_model(), prompts, **options))


@pytest.mark.parametrize("use_cache", [True, False])
def test_with_a_document_mask_bos_ends_the_row(use_cache):
    model = make_model(document_mask=True, bos_id=0)
    options = {"temperature": 1.0, "max_tokens": 200, "use_cache": use_cache}
    made = rows(model, [[0, 1], [0, 2]], **options)
    assert all(row[-1] == 0 and 0 not in row[:-1] for row in made)
    with pytest.raises(UsageError, match="prompt 0 holds a second document"):
        rows(model, [[0, 1, 0]], **options)


@pytest.mark.slow
def test_a_cache_makes_a_token_cost_one_token():
    """Reading 1 of 256 positions instead of all saves far more than the factor asserted."""
    shape = {"vocab_size": 65, "seq_len": 256, "n_layer": 6, "n_head": 6, "d_model": 384}
    model = make_model(**{**shape, "d_ff": 1536, "mlp": "gelu"})

    def seconds(use_cache: bool) -> float:
        start = time.perf_counter()
        rows(model, [[1] * 200], max_tokens=20, use_cache=use_cache, temperature=1.0)
        return time.perf_counter() - start

    seconds(True)
    assert min(seconds(True) for _ in range(3)) < seconds(False) / 3
