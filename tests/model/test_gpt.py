"""The decoder against a second one, written slowly and apart, straight from the formulas."""

import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st

from minillm.config.model import MLPS, NORMS, POSITIONS, ModelConfig
from minillm.config.presets import PRESETS
from minillm.errors import UsageError
from minillm.model import gpt as model_file
from minillm.model.gpt import GPT
from minillm.model.positions import alibi_slopes, rope_tables, sinusoidal_table
from minillm.model.size import flops_per_token, n_matrix_parameters, n_parameters
from minillm.ops import EAGER
from tests.support.broad import broad

BASE = {"vocab_size": 23, "seq_len": 16, "n_layer": 2, "n_head": 4, "d_model": 16, "d_ff": 24}
BOS = 0


def config_of(**options):
    return ModelConfig(**{**BASE, "bos_id": BOS, **options})


def make_model(config, seed=0):
    """A model in float64 whose every weight, norms and biases too, is drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(config, EAGER, torch.float64).double().eval()
    with torch.no_grad():
        for w in model.parameters():
            spread = 0.5 if w.dim() == 1 else w.shape[1] ** -0.5
            mean = 1.0 if w.dim() == 1 else 0.0
            w.normal_(mean, spread, generator=generator)
    return model


def make_tokens(config, B=2, T=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, config.vocab_size, (B, T), generator=generator)
    tokens[0, [0, 4]] = BOS
    tokens[-1, [2, 3, T - 1]] = BOS
    return tokens


# -- the second decoder: one text at a time, one head at a time, float64 ---------------------------


def norm_by_hand(c, w, name, x):
    if c.norm == "rmsnorm":
        return x / ((x * x).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[name + ".weight"]
    x = x - x.mean(-1, keepdim=True)
    x = x / ((x * x).mean(-1, keepdim=True) + c.norm_eps).sqrt()
    return x * w[name + ".weight"] + w.get(name + ".bias", 0.0)


def mlp_by_hand(c, w, name, x):
    z = x @ w[name + ".up.weight"].T + w.get(name + ".up.bias", 0.0)
    if c.mlp == "swiglu":
        z = z[:, : c.d_ff] / (1 + torch.exp(-z[:, : c.d_ff])) * z[:, c.d_ff :]
    elif c.mlp == "geglu":
        z = z[:, : c.d_ff] * (1 + torch.erf(z[:, : c.d_ff] / 2**0.5)) / 2 * z[:, c.d_ff :]
    elif c.mlp == "gelu":
        z = z * (1 + torch.erf(z / 2**0.5)) / 2
    elif c.mlp == "gelu-tanh":
        z = z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    elif c.mlp == "relu2":
        z = torch.where(z > 0, z * z, 0.0)
    return z @ w[name + ".down.weight"].T + w.get(name + ".down.bias", 0.0)


def turned(c, x, position):
    """x: (D,) of one head, rotated."""
    half = c.d_head // 2
    y = x.clone()
    for i in range(half):
        angle = position * c.rope_base ** (-2 * i / c.d_head)
        cos, sin = (torch.tensor(f(angle)).float().double() for f in (math.cos, math.sin))
        y[i] = x[i] * cos - x[i + half] * sin
        y[i + half] = x[i + half] * cos + x[i] * sin
    return y


def slope_by_hand(n_head, h):
    """Press et al. 2021: a geometric sequence; between powers of two, every other of the next."""

    def powers(n):
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    below = 2 ** int(math.log2(n_head))
    return (powers(below) + powers(2 * below)[::2])[h]


def attention_by_hand(c, w, name, x, documents):
    T = x.shape[0]
    H, G, D = c.n_head, c.n_kv_head, c.d_head
    z = x @ w[name + ".qkv.weight"].T + w.get(name + ".qkv.bias", 0.0)
    heads = [[z[t, i * D : (i + 1) * D] for t in range(T)] for i in range(H + 2 * G)]
    q, k, v = heads[:H], heads[H : H + G], heads[H + G :]
    if c.qk_norm:
        for some, weight in ((q, w[name + ".q_norm"]), (k, w[name + ".k_norm"])):
            for rows in some:
                rows[:] = [r / ((r @ r) / D + c.norm_eps).sqrt() * weight for r in rows]
    if c.position == "rope":
        for rows in q + k:
            rows[:] = [turned(c, r, t) for t, r in enumerate(rows)]
    y = torch.zeros(T, H * D, dtype=torch.float64)
    for h in range(H):
        keys, values = k[h * G // H], v[h * G // H]
        for i in range(T):
            seen = [
                j
                for j in range(i + 1)
                if (not c.window or i - j < c.window) and documents[i] == documents[j]
            ]
            scores = torch.stack([q[h][i] @ keys[j] / math.sqrt(D) for j in seen])
            if c.position == "alibi":
                scores -= slope_by_hand(H, h) * torch.tensor([i - j for j in seen])
            p = scores.exp() / scores.exp().sum()
            y[i, h * D : (h + 1) * D] = sum(p[n] * values[j] for n, j in enumerate(seen))
    return y @ w[name + ".out.weight"].T + w.get(name + ".out.bias", 0.0)


def logits_by_hand(c, w, tokens):
    """tokens: (B, T).    Returns (B, T, V)."""
    rows = []
    for text in tokens.tolist():
        x = torch.stack([w["embed.weight"][t] for t in text])
        if c.position == "learned":
            x = x + w["position.weight"][: len(text)]
        if c.position == "sinusoidal":
            x = x * math.sqrt(c.d_model)
            for t in range(len(text)):
                for i in range(c.d_model // 2):
                    angle = t / 10000 ** (2 * i / c.d_model)
                    x[t, 2 * i] += torch.tensor(math.sin(angle)).float().item()
                    x[t, 2 * i + 1] += torch.tensor(math.cos(angle)).float().item()
        starts = [text[: t + 1].count(c.bos_id) for t in range(len(text))]
        documents = starts if c.document_mask else [0] * len(text)
        for layer in range(c.n_layer):
            b = f"blocks.{layer}."
            z = norm_by_hand(c, w, b + "attention_norm", x)
            x = x + attention_by_hand(c, w, b + "attention", z, documents)
            x = x + mlp_by_hand(c, w, b + "mlp", norm_by_hand(c, w, b + "mlp_norm", x))
        x = norm_by_hand(c, w, "norm", x)
        z = x @ w["embed.weight" if c.tie_embeddings else "head.weight"].T
        if c.logit_softcap:
            z = c.logit_softcap * torch.tanh(z / c.logit_softcap)
        rows.append(z)
    return torch.stack(rows)


def assert_same(ours, theirs):
    """Equal to 1e-12 of the largest."""
    assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


ONE_AT_A_TIME = [
    {},
    *({"position": p} for p in POSITIONS),
    *({"norm": n, "bias": b} for n in NORMS for b in (False, True)),
    *({"mlp": m, "bias": b} for m in MLPS for b in (False, True)),
    {"n_kv_head": 2},
    {"n_kv_head": 1},
    {"n_head": 6, "d_head": 4, "n_kv_head": 3, "position": "alibi"},
    {"qk_norm": True},
    {"qk_norm": True, "position": "none"},
    {"window": 1},
    {"window": 3},
    {"window": 9},
    {"window": 100},
    {"window": 3, "position": "alibi"},
    {"document_mask": True},
    {"document_mask": True, "position": "alibi", "window": 3},
    {"tie_embeddings": True},
    {"logit_softcap": 0.7},
    {"d_head": 10},
    {"d_head": 2, "n_head": 3},
    {"d_ff": 5},
    {"rope_base": 10.0},
    {"norm_eps": 0.5},
    {"norm_eps": 0.5, "norm": "layernorm", "qk_norm": True},
]


@torch.no_grad()
def check_logits(config):
    model, tokens = make_model(config), make_tokens(config)
    weights = dict(model.state_dict())
    logits = model(tokens)
    assert_same(logits, logits_by_hand(config, weights, tokens))
    targets = make_tokens(config, seed=1)
    targets[:, 0] = -100
    mean = F.cross_entropy(logits[:, 1:].flatten(0, 1), targets[:, 1:].flatten())
    assert model(tokens, targets).item() == pytest.approx(mean.item(), rel=1e-12)


@pytest.mark.parametrize("options", ONE_AT_A_TIME, ids=str)
def test_logits_and_loss_by_hand(options):
    check_logits(config_of(**options))


ANY_CONFIG = st.builds(
    lambda share, d_head, **options: config_of(
        n_kv_head=options["n_head"] // share if options["n_head"] % share == 0 else None,
        d_head=d_head if options["d_model"] % options["n_head"] else None,
        **options,
    ),
    share=st.integers(1, 4),
    d_head=st.sampled_from([2, 4, 6]),
    n_layer=st.integers(1, 2),
    n_head=st.integers(1, 4),
    d_model=st.sampled_from([8, 12]),
    d_ff=st.integers(1, 20),
    position=st.sampled_from(POSITIONS),
    norm=st.sampled_from(NORMS),
    mlp=st.sampled_from(MLPS),
    bias=st.booleans(),
    qk_norm=st.booleans(),
    window=st.integers(0, 10),
    tie_embeddings=st.booleans(),
    logit_softcap=st.sampled_from([0.0, 0.5, 30.0]),
    document_mask=st.booleans(),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(ANY_CONFIG)
def test_logits_of_any_combination_by_hand(config):
    check_logits(config)


# -- parameters -----------------------------------------------------------------------------------


def parameters_of(config):
    """Counted, without memory."""
    with torch.device("meta"):
        model = GPT(config, EAGER)
    return sum(w.numel() for w in model.parameters())


@settings(max_examples=60)
@given(ANY_CONFIG, st.integers(1, 50), st.integers(1, 40))
def test_n_parameters_is_the_real_count(config, vocab_size, seq_len):
    config = replace(config, vocab_size=vocab_size, seq_len=seq_len)
    assert n_parameters(config) == parameters_of(config)
    names = [f"blocks.{i}." for i in range(config.n_layer)] + ["head."]
    with torch.device("meta"):
        shapes = {n: w.shape for n, w in GPT(config, EAGER).state_dict().items()}
    matrices = [s for n, s in shapes.items() if n.startswith(tuple(names)) and len(s) == 2]
    assert n_matrix_parameters(config) == sum(map(math.prod, matrices))


def test_flops_per_token():
    config = config_of(window=5)
    attention, mlp = 4 * 16 * 16, 3 * 24 * 16
    products = 2 * (attention + mlp) + 23 * 16
    assert n_matrix_parameters(config) == products
    assert flops_per_token(config) == 6 * products + 12 * 2 * 16 * 5
    assert flops_per_token(config_of()) == 6 * products + 12 * 2 * 16 * 16


def preset_config(name, **options):
    names = {f.name for f in fields(ModelConfig)}
    values = {k: v for k, v in PRESETS[name].items() if k in names}
    return ModelConfig(**{**values, **options})


NANOGPT = [
    ("nanogpt-char-cpu", 65, 804_096),
    ("nanogpt-char", 65, 10_745_088),
    ("nanogpt-124m", 50304, 124_373_760),
]


@broad("preset, V, count", NANOGPT, quick=2)
def test_nanogpt_presets_have_its_parameters(preset, V, count):
    config = preset_config(preset, vocab_size=V)
    C, L, T = config.d_model, config.n_layer, config.seq_len
    block = C * 3 * C + C * C + C * 4 * C + 4 * C * C + 2 * C
    assert V * C + T * C + L * block + C == count  # the head is the embedding
    assert n_parameters(config) == parameters_of(config) == count


NANOGPT_NAMES = {
    "transformer.wte": "embed",
    "transformer.wpe": "position",
    "transformer.ln_f": "norm",
    "lm_head": "head",
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}


def nanogpt_by_hand(w, tokens, L, H):
    """Its formulas, from its names; w: name without ".weight" -> weight."""
    T, C = tokens.shape[1], w["transformer.wte"].shape[1]
    x = w["transformer.wte"][tokens] + w["transformer.wpe"][torch.arange(T)]

    def layer_norm(x, weight):
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).square().mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * weight

    future = torch.ones(T, T).triu(1).bool()
    for i in range(L):
        h = f"transformer.h.{i}."
        z = layer_norm(x, w[h + "ln_1"]) @ w[h + "attn.c_attn"].T
        q, k, v = (z[..., n * C : (n + 1) * C].unflatten(-1, (H, -1)) for n in range(3))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(C // H)
        p = scores.masked_fill(future, -math.inf).softmax(-1)
        y = torch.einsum("bhij,bjhd->bihd", p, v).flatten(2)
        x = x + y @ w[h + "attn.c_proj"].T
        z = layer_norm(x, w[h + "ln_2"]) @ w[h + "mlp.c_fc"].T
        z = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
        x = x + z @ w[h + "mlp.c_proj"].T
    return layer_norm(x, w["transformer.ln_f"]) @ w["lm_head"].T


@pytest.mark.parametrize("preset", ["nanogpt-char-cpu", "nanogpt-char"])
@torch.no_grad()
def test_nanogpt_presets_have_its_logits(generator, preset):
    config = preset_config(preset, vocab_size=65)
    theirs = {}
    for i in range(config.n_layer):
        for name in NANOGPT_NAMES:
            if name.startswith(("ln_", "attn", "mlp")):
                theirs[f"transformer.h.{i}.{name}"] = None
    theirs |= dict.fromkeys(n for n in NANOGPT_NAMES if n.startswith(("transformer.", "lm_")))

    def our_name(name):
        head, _, tail = name.removeprefix("transformer.h.").partition(".")
        known = NANOGPT_NAMES.get(name)
        return (known or f"blocks.{head}.{NANOGPT_NAMES[tail]}") + ".weight"

    model = GPT(config, EAGER, generator=generator).eval()
    shapes = {n: w.shape for n, w in model.state_dict().items()}
    assert {our_name(n) for n in theirs} == set(shapes)  # none is left out on either side
    for name in theirs:
        theirs[name] = 0.05 * torch.randn(shapes[our_name(name)], generator=generator)
        theirs[name] += theirs[name].dim() == 1
    theirs["lm_head"] = theirs["transformer.wte"]
    model.load_state_dict({our_name(n): w for n, w in theirs.items()})
    tokens = torch.randint(65, (2, config.seq_len), generator=generator)
    expected = nanogpt_by_hand(theirs, tokens, config.n_layer, config.n_head)
    assert expected.abs().max() > 1
    assert (model(tokens) - expected).abs().max() <= 1e-5


# -- start weights --------------------------------------------------------------------------------


def spread(w):
    return w.std().item()


def test_gpt2_start_weights():
    config = config_of(d_model=128, vocab_size=500, n_layer=8, bias=True, position="learned")
    model = GPT(config, EAGER, generator=torch.Generator().manual_seed(0))
    for name, w in model.named_parameters():
        if name.endswith(".bias"):
            assert not w.any()
        elif w.dim() == 1:
            assert w.eq(1).all()
        else:
            deep = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / 4 if deep else 0.02
            # Five standard deviations of an estimate from n numbers.
            assert abs(spread(w) / std - 1) < 5 / math.sqrt(2 * w.numel()), name
    again = GPT(config, EAGER, generator=torch.Generator().manual_seed(0))
    other = GPT(config, EAGER, generator=torch.Generator().manual_seed(1))
    assert again.head.weight.equal(model.head.weight)
    assert not other.head.weight.equal(model.head.weight)


def test_zero_start_is_the_identity_and_predicts_nothing():
    config = config_of(d_model=64, init="zero", bias=True)
    model = GPT(config, EAGER, torch.float64).double().eval()
    tokens = make_tokens(config)
    assert not model(tokens).any()
    assert model(tokens, tokens).item() == pytest.approx(math.log(23), rel=1e-12)
    x = model.embed(tokens)
    normed = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    assert_same(model.trunk(tokens), normed)
    assert abs(spread(model.embed.weight) - 1) < 0.15
    assert abs(spread(model.blocks[0].mlp.up.weight) * 8 - 1) < 0.15


# -- what the model must not do -------------------------------------------------------------------


@pytest.mark.parametrize("options", ONE_AT_A_TIME, ids=str)
@torch.no_grad()
def test_the_future_changes_nothing(options):
    config = config_of(**options)
    model, tokens = make_model(config), make_tokens(config)
    before = model(tokens)
    for t in (1, 5, 8):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 7) % 23
        after = model(changed)
        assert_same(after[:, :t], before[:, :t])
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_documents_do_not_see_each_other(position):
    config = config_of(position=position, document_mask=True)
    model = make_model(config)
    tokens = torch.tensor([[BOS, 3, 4, BOS, 5, 6, 7]])
    changed = torch.tensor([[BOS, 9, 8, BOS, 5, 6, 7]])
    assert_same(model(tokens)[:, 3:], model(changed)[:, 3:])
    open_config = replace(config, document_mask=False)
    seeing = make_model(open_config)
    assert (seeing(tokens)[:, 3:] - seeing(changed)[:, 3:]).abs().max() > 1e-3
    if position in ("alibi", "none"):  # positions are relative: a document is as if alone
        assert_same(model(tokens)[:, 3:], model(tokens[:, 3:]))


@torch.no_grad()
def test_a_window_reaches_back_so_far_and_no_further():
    config = config_of(window=3, position="none", n_layer=2)
    model, tokens = make_model(config), make_tokens(config)
    changed = tokens.clone()
    changed[:, 0] = 20
    difference = (model(changed) - model(tokens)).abs().amax((0, 2))
    reach = 2 * (3 - 1)  # layers x (window - 1)
    assert (difference[: reach + 1] > 1e-6).all()
    assert (difference[reach + 1 :] < 1e-12).all()


def test_dropout_only_in_training_and_reproducibly():
    dry, wet = config_of(), config_of(dropout=0.5)
    model, dropping = make_model(dry), make_model(wet)
    tokens = make_tokens(dry)
    assert dropping(tokens).equal(model(tokens))
    dropping.train()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(dropping(tokens))
    assert results[0].equal(results[1])
    assert not results[0].equal(results[2])
    assert not results[0].equal(model(tokens))
    model.train()
    assert model(tokens).equal(model.eval()(tokens))


def test_dropout_is_on_embeddings_attention_and_branches(monkeypatch):
    places = []
    real = F.dropout

    def spy(x, p=0.5, training=True, inplace=False):
        places.append((tuple(x.shape), p))
        return real(x, p, training, inplace)

    monkeypatch.setattr(F, "dropout", spy)
    seen = []

    def attention(*args, dropout=0.0, **kwargs):
        seen.append(dropout)
        return EAGER.attention(*args, dropout=dropout, **kwargs)

    config = config_of(dropout=0.25)
    model = GPT(config, replace(EAGER, attention=attention)).train()
    model(make_tokens(config))
    assert seen == [0.25] * 2
    assert places == [((2, 9, 16), 0.25)] * 5  # embeddings, and two branches in each of two blocks
    seen.clear()
    model.eval()(make_tokens(config))
    assert seen == [0.0] * 2


# -- the key-value cache --------------------------------------------------------------------------

CACHED = [
    *({"position": p, "window": w} for p in POSITIONS for w in (0, 1, 3)),
    {"position": "rope", "qk_norm": True, "n_kv_head": 2},
    {"position": "alibi", "n_kv_head": 1, "bias": True},
    {"position": "learned", "norm": "layernorm", "mlp": "gelu", "tie_embeddings": True},
    {"logit_softcap": 2.0},
]


@pytest.mark.parametrize("options", CACHED, ids=str)
@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 1, 1, 1, 1, 1), (3, 4, 2)], ids=str)
@torch.no_grad()
def test_cached_equals_uncached(options, pieces):
    config = config_of(**options)
    model, tokens = make_model(config), make_tokens(config)
    expected = model(tokens)
    cache, at, got = model.make_cache(batch=2), 0, []
    for n in pieces:
        got.append(model.logits(model.trunk(tokens[:, at : at + n], cache)))
        at += n
        assert cache.lengths == [at, at] and cache.equal_lengths()
    assert_same(torch.cat(got, 1), expected)


@pytest.mark.parametrize("options", CACHED, ids=str)
@pytest.mark.parametrize("step", [1, 2])
@torch.no_grad()
def test_ragged_rows_equal_single_ones(options, step):
    config = config_of(**options)
    model = make_model(config)
    tokens = make_tokens(config, B=3, T=12)
    expected = [model(tokens[b : b + 1])[0] for b in range(3)]
    cache, held = model.make_cache(batch=3), [2, 6, 3]
    for b, n in enumerate(held):
        view = cache.row_view(b)
        first = model.logits(model.trunk(tokens[b : b + 1, :n], view))
        assert_same(first[0], expected[b][:n])
        cache.lengths[b] = view.lengths[0]
    assert cache.lengths == held and not cache.equal_lengths()
    for _ in range(6 // step):
        new = torch.stack([tokens[b, n : n + step] for b, n in enumerate(cache.lengths)])
        logits = model.logits(model.trunk(new, cache))
        for b, end in enumerate(cache.lengths):
            assert_same(logits[b], expected[b][end - step : end])
    cache.keep_rows([2, 0])
    new = torch.stack([tokens[b, n : n + 1] for b, n in zip((2, 0), cache.lengths, strict=True)])
    logits = model.logits(model.trunk(new, cache))
    for i, b in enumerate((2, 0)):
        assert_same(logits[i, 0], expected[b][cache.lengths[i] - 1])


@torch.no_grad()
def test_a_row_is_read_anew_from_where_it_is_kept():
    """What a row held before, and what its neighbours hold, leaves no trace."""
    config = config_of()
    model, tokens = make_model(config), make_tokens(config, T=12)
    cache = model.make_cache(batch=2)
    model.trunk(tokens, cache)
    view = cache.row_view(1, 4)
    other = (tokens[1:, 4:9] + 5) % 23
    logits = model.logits(model.trunk(other, view))
    text = torch.cat((tokens[1:, :4], other), 1)
    assert_same(logits, model(text)[:, 4:])
    last = model.logits(model.trunk(tokens[:, :1], _cut(cache, [12, 9])))
    for b, row in enumerate((tokens[:1], text)):
        whole = torch.cat((row, tokens[b : b + 1, :1]), 1)
        assert_same(last[b], model(whole)[0, -1:])


def _cut(cache, lengths):
    cache.lengths = lengths
    return cache


def test_the_cache_has_an_end():
    model = make_model(config_of())
    with pytest.raises(ValueError, match="17 positions; seq_len is 16"):
        model(torch.ones(1, 17, dtype=torch.int64))
    cache = model.make_cache(1)
    model.trunk(torch.ones(1, 16, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="17 positions; seq_len is 16"):
        model.trunk(torch.ones(1, 1, dtype=torch.int64), cache)
    small = model.make_cache(1, capacity=4)
    assert small.capacity == 4 and small.k.shape == (2, 1, 4, 4, 4)
    with pytest.raises(ValueError, match="cache holds 4 positions; 5 are needed"):
        model.trunk(torch.ones(1, 5, dtype=torch.int64), small)


# -- dtypes, tables, refusals ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"norm": "layernorm", "bias": True}, {"qk_norm": True}])
def test_a_bf16_stream_has_fp32_weights_and_gradients(options):
    config = config_of(**options)
    model = GPT(config, EAGER, torch.bfloat16, torch.Generator().manual_seed(0))
    tokens = make_tokens(config)
    assert model.trunk(tokens).dtype == torch.bfloat16 and model(tokens).dtype == torch.float32
    loss = model(tokens, tokens)
    assert loss.dtype == torch.float32
    loss.backward()
    for name, w in model.named_parameters():
        assert w.dtype == w.grad.dtype == torch.float32, name
        assert w.grad.isfinite().all() and w.grad.any(), name
    exact = GPT(config, EAGER, torch.float32)
    exact.load_state_dict(model.state_dict())
    # 2 L + 1 roundings of the stream to 8 bits, and as many again in the branches.
    assert abs(loss.item() - exact(tokens, tokens).item()) < 10 * 2**-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_not_rounded_to_the_dtype_of_the_stream(dtype):
    """As large logits of narrow weights, in which sampling computes, would lose their order."""
    config = config_of()
    model = GPT(config, EAGER, dtype, torch.Generator().manual_seed(0)).requires_grad_(False)
    model.head.weight.data.mul_(100)
    model.head.weight.data = model.head.weight.data.to(dtype)
    x = model.trunk(make_tokens(config))
    exact = x.double() @ model.head.weight.double().T
    assert exact.abs().max() > 10
    torch.testing.assert_close(model.logits(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_rope_tables_are_exact_far_out():
    cos, sin = rope_tables(100_000, 8, 10000.0)
    for t in (1, 99_999):
        for i in range(4):
            angle = t * 10000.0 ** (-2 * i / 8)
            assert cos[t, i].item() == pytest.approx(math.cos(angle), abs=2**-24)
            assert sin[t, i].item() == pytest.approx(math.sin(angle), abs=2**-24)


def test_sinusoids_alternate():
    table = sinusoidal_table(5, 4)
    expected = [math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)]
    assert table[3].tolist() == pytest.approx(expected, abs=2**-24)


@pytest.mark.parametrize("n_head", [1, 2, 3, 4, 6, 7, 8, 12, 16])
def test_alibi_slopes(n_head):
    expected = [slope_by_hand(n_head, h) for h in range(n_head)]
    assert alibi_slopes(n_head).tolist() == pytest.approx(expected, rel=2**-23)
    assert len(set(expected)) == n_head


def test_matrices_name_the_maps_stacked_in_each_weight():
    config = config_of(n_kv_head=2, d_head=6)
    model = make_model(config)
    weights = dict(model.named_parameters())
    matrices = model.matrices()
    assert matrices["blocks.1.attention.qkv.weight"] == (24, 12, 12)
    assert matrices["blocks.0.mlp.up.weight"] == (24, 24)
    assert matrices["blocks.0.mlp.down.weight"] == (16,)
    assert len(matrices) == 8
    for name, parts in matrices.items():
        assert weights[name].dim() == 2 and weights[name].shape[0] == sum(parts)
    assert make_model(config_of(mlp="gelu")).matrices()["blocks.0.mlp.up.weight"] == (24,)


def test_a_model_needs_a_vocabulary_and_documents_a_beginning():
    with pytest.raises(ValueError, match="vocab_size"):
        GPT(config_of(vocab_size=None), EAGER)
    with pytest.raises(ValueError, match="bos_id"):
        GPT(config_of(document_mask=True, bos_id=None), EAGER)
    with pytest.raises(UsageError):
        GPT(config_of(d_head=3), EAGER)


def test_tied_embeddings_are_one_tensor():
    model = make_model(config_of(tie_embeddings=True))
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_the_model_file_knows_no_kernels():
    assert not hasattr(model_file, "eager") and not hasattr(model_file, "reference")
