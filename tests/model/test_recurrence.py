"""Recurrent depth: draws, start states, injections, the loop and its gradients."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from minillm.config.train import ModelConfig
from minillm.errors import UsageError
from minillm.model.gpt import GPT
from minillm.model.recurrence import draw, start_noise, state_keys
from minillm.model.size import flops_per_token, n_matrix_parameters, n_parameters
from minillm.ops import EAGER, REFERENCE
from tests.support.broad import broad
from tests.support.generating import generated

SHAPE = {"vocab_size": 31, "seq_len": 16, "n_head": 2, "d_model": 16, "d_ff": 24}
STYLES = ("huginn", "parcae")


def model_of(dtype=torch.float64, seed=3, **options) -> GPT:
    options = {"recurrent": "1,2,1", "mean_recurrence": 4, **options}
    return GPT(ModelConfig(**{**SHAPE, **options}), EAGER, dtype,
               torch.Generator().manual_seed(seed)).to(dtype)  # fmt: skip


def text(rows=2, T=16) -> torch.Tensor:
    return (torch.arange(rows * T) * 7 + 3).reshape(rows, T) % 31


# Draws.


def many(mean: float, cap: int = 10**6, count: int = 20_000) -> torch.Tensor:
    return torch.tensor(draw(0, 0, count, mean, cap), dtype=torch.float64)


def test_draws_are_distributed_as_the_paper_s():
    """Mean, deviation and quantiles of 400,000 draws of the paper's sampler at its r = 32, which
    is a mean of 33 here, and at 8, a mean of 9."""
    for mean, deviation, quantiles in (
        (33, 18.0, {0.01: 8, 0.05: 12, 0.5: 29, 0.95: 67, 0.99: 93}),
        (9, 5.1, {0.01: 2, 0.05: 3, 0.5: 8, 0.95: 19, 0.99: 26}),
    ):
        found = many(mean)
        assert found.mean() == pytest.approx(mean, abs=4 * deviation / len(found) ** 0.5)
        assert found.std() == pytest.approx(deviation, rel=0.05)
        for share, expected in quantiles.items():
            assert abs(found.quantile(share) - expected) <= max(1, 0.04 * expected)


def test_draws_are_a_function_of_seed_step_and_group():
    first = draw(7, 3, 4, 8, 32)
    assert first == draw(7, 3, 4, 8, 32) and first[:2] == draw(7, 3, 2, 8, 32)
    others = [draw(8, 3, 4, 8, 32), draw(7, 4, 4, 8, 32)]
    assert all(first != other for other in others)
    assert len({tuple(draw(7, step, 1, 8, 32)) for step in range(50)}) > 5


def test_draws_are_cut_and_never_below_one():
    assert many(8, cap=10, count=2000).max() == 10
    assert many(1.5, count=2000).min() == 1
    assert draw(0, 0, 3, 1, 9) == [1, 1, 1]


# Start states.


def test_start_states_are_cut_normal():
    keys = state_keys(5, torch.arange(40))
    s = start_noise(keys, torch.arange(50), 64, torch.float32)
    assert s.shape == (40, 50, 64)
    # Variance of a normal cut at 3 deviations: 0.9733 of the uncut one's.
    assert s.mean().abs() < 0.01 and s.var().item() == pytest.approx(0.4 * 0.9733, rel=0.02)
    z = s / math.sqrt(0.4)
    assert z.abs().max() <= 3 and (z.abs() > 2).float().mean() > 0.03
    for a, b in ((z[:, :, 1:], z[:, :, :-1]), (z[:, 1:], z[:, :-1]), (z[1:], z[:-1])):
        assert (a * b).mean().abs() < 0.015  # columns, positions, samples: no correlation


def test_start_states_know_no_batch_row_and_no_window():
    keys = state_keys(1, torch.tensor([4, 9, 2]))
    whole = start_noise(keys, torch.arange(8), 6, torch.float32)
    alone = start_noise(keys[1:2], torch.arange(5, 8), 6, torch.float32)
    assert torch.equal(alone[0], whole[1, 5:])
    ragged = start_noise(keys, torch.tensor([[5], [0], [7]]), 6, torch.float32)
    assert torch.equal(ragged[:, 0], whole[[0, 1, 2], [5, 0, 7]])
    assert not torch.equal(start_noise(state_keys(2, torch.tensor([4])), torch.arange(8), 6,
                                       torch.float32)[0], whole[0])  # fmt: skip


# The loop.


def plain_twin(model: GPT) -> GPT:
    """The stack of the same blocks, each once, as a model without recurrence."""
    twin = GPT(ModelConfig(**{**SHAPE, "n_layer": 4, "qk_norm": model.config.qk_norm}), EAGER,
               torch.float64).to(torch.float64)  # fmt: skip
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin


def test_one_iteration_that_only_reads_the_text_is_a_plain_stack():
    """Parcae's blocks, injection [0 | identity], no norm on the way: the plain model's logits."""
    model = model_of(recurrence_style="parcae", injection="concat", mean_recurrence=1, init="gpt2")
    with torch.no_grad():
        model.injection.state.weight.zero_()
        model.injection.text.weight.copy_(torch.eye(16))
        twin = plain_twin(model)
        model.injection.norm = None
        between, model.norm = model.norm, torch.nn.Identity()
        x = between(model.trunk(text()))
        assert torch.equal(model.logits(x), twin(text()))


def test_a_split_adapter_is_the_concatenated_one():
    model = model_of()
    s, e = torch.randn(2, 2, 5, 16, dtype=torch.float64, requires_grad=True)
    whole = torch.cat((model.injection.state.weight, model.injection.text.weight), 1)
    ours = model.injection(s, model.injection.prepare(e))
    plain = F.linear(torch.cat((s, e), -1), whole)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    weights = [model.injection.state.weight, model.injection.text.weight]
    for a, b in zip(torch.autograd.grad(ours.sin().sum(), weights),
                    torch.autograd.grad(plain.sin().sum(), weights), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_linear_part_of_a_diagonal_injection_contracts():
    model = model_of(recurrence_style="parcae")
    with torch.no_grad():
        model.injection.rate.copy_(torch.linspace(-3, 3, 16))
        model.injection.step.copy_(torch.linspace(3, -3, 16).roll(5))
    one = torch.ones(1, 1, 16, dtype=torch.float64)
    decay = model.injection(one, torch.zeros_like(one))
    assert ((decay > 0) & (decay < 1)).all()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_diagonal_injection_contracts_in_bf16_too(weights):
    """With a decay that bf16 itself rounds to 1: what comes is the truth, rounded once."""
    injection = model_of(recurrence_style="parcae").injection.to(weights)
    with torch.no_grad():
        injection.rate.fill_(-6.0)
    s, prepared = torch.randn(2, 4, 50, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = math.exp(-math.log(2) * math.exp(-6)) * s.double() + prepared.double() / 64
    ours = injection(s * 1, prepared / 64)
    assert ours.dtype == torch.bfloat16 and math.exp(-math.log(2) * math.exp(-6)) < 0.9983
    off = (ours.double() - exact).abs() / exact.abs().clamp(min=1e-6)
    assert off.max() <= 2**-8 * 1.01  # half a unit in the last place
    assert (ours != s + prepared / 64).any()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("r", "depth"), [(5, 2), (5, 1), (3, 8)])
def test_gradients_are_those_of_the_last_iterations(style, r, depth):
    """Against the same graph written out, with the state cut by detach, in fp64."""
    model = model_of(recurrence_style=style, backprop_depth=depth)
    tokens, targets = text(), text().roll(1)
    model(tokens, targets, recurrence=r).backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    inputs, x = model.embed_tokens(tokens, None)
    x = model.blocks[0](x, inputs.rotation, None, None, 0)
    s = model.start_state(x, None, inputs)
    for i in range(r):
        u = model.injection(s, model.injection.prepare(x))
        for block in model.blocks[1:3]:
            u = block(u, inputs.rotation, None, None, 0)
        s = u.detach() if i < r - depth else u
    y = model.blocks[3](model.norm(s), inputs.rotation, None, None, 0)
    model.loss(model.norm(y), targets).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-9, atol=1e-12)
        assert ours[name].abs().max() > 0, name


def test_core_gradients_in_bf16_after_a_phase_without():
    """PyTorch's autocast once lost them; here weights are cast by hand."""
    exact = model_of(torch.float32, backprop_depth=2)
    exact(text(), text(), recurrence=6).backward()
    model = model_of(torch.float32, backprop_depth=2)
    model.dtype = torch.bfloat16
    model(text(), text(), recurrence=6).backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        cosine = F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0)
        assert p.grad.abs().max() > 0 and cosine > 0.98, f"{name}: {cosine:.3f}"


@pytest.mark.parametrize("style", STYLES)
def test_readings_are_what_the_trunk_gives(style):
    model = model_of(recurrence_style=style).eval()
    with torch.no_grad():
        for r, x, _ in model.readings(text(), [1, 2, 5]):
            assert torch.equal(x, model.trunk(text(), recurrence=r))


def test_checkpointing_changes_no_gradient():
    found = []
    for again in (False, True):
        for recurrent in (None, "1,2,1"):
            model = model_of(recurrent=recurrent, n_layer=3)
            model.checkpointing = again
            model(text(), text()).backward()
            found.append([p.grad for p in model.parameters()])
    for a, b in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("depths", "r", "least"), [("1,2,1", 8, 6), ("6,1,6", 1, 6)])
def test_checkpointing_keeps_less(depths, r, least):
    """Of iterations, and of the blocks before and after them."""
    kept = []
    for again in (False, True):
        model, sizes = model_of(recurrent=depths), []
        model.checkpointing = again

        def note(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model(text(), text(), recurrence=r)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / least, kept


def test_the_state_of_a_sandwich_is_bounded():
    """Its norm after hundred iterations is that after one, whatever the weights."""
    model = model_of()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(3)
        norms = [s.norm().item() for _, _, s in model.readings(text(), [1, 10, 100])]
    assert all(b == pytest.approx(a, rel=0.05) for a, b in pairwise(norms))


# What it is made of.


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("injection", ["concat", "add", "diagonal", None])
def test_parameters_are_counted(style, injection):
    model = model_of(recurrence_style=style, injection=injection)
    stored = sum(p.numel() for p in model.parameters())
    assert stored == n_parameters(model.config)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2)
    assert matrices - model.embed.weight.numel() == n_matrix_parameters(model.config)


def test_without_a_core_an_injection_counts_for_nothing():
    model = model_of(recurrent=None, n_layer=1, injection="concat")
    assert sum(p.numel() for p in model.parameters()) == n_parameters(model.config)


@pytest.mark.parametrize(
    ("injection", "outside", "inside"), [("concat", 1, 1), ("add", 0, 0), ("diagonal", 1, 0)]
)
def test_flops_are_counted(injection, outside, inside):
    """By hand: d_model 16, 2 heads of 8, MLP of 24 gated, 31 tokens, context 16; square matrices
    of the injection, computed once a pass and in each iteration."""
    c = model_of(backprop_depth=3, injection=injection).config
    block = 6 * (4 * 16 * 16 + 3 * 16 * 24) + 12 * 16 * 16
    once = 2 * block + 6 * 31 * 16 + 6 * 256 * outside
    loop = 2 * block + 6 * 256 * inside
    assert flops_per_token(c, 5) == once + 3 * loop + 2 * loop / 3
    assert flops_per_token(c, 2) == once + 2 * loop
    plain = ModelConfig(**{**SHAPE, "n_layer": 4})
    assert flops_per_token(plain) == 6 * n_matrix_parameters(plain) + 12 * 4 * 16 * 16


@pytest.mark.parametrize("style", STYLES)
def test_start_weights_of_takase(style):
    """The default of both styles: on text better than gpt2 and zero."""
    shape = {"d_model": 64, "n_head": 4, "d_ff": 128, "vocab_size": 500}
    model = model_of(torch.float32, recurrence_style=style, **shape)
    std = math.sqrt(2 / (5 * 64))
    deep = math.sqrt(2 * (1 + 4 * 2 + 1))
    assert model.config.init == "takase"
    for name, w in model.named_parameters():
        if w.dim() != 2 or name in model.undecayed():
            continue
        expected = std / deep if name.endswith(("out.weight", "down.weight")) else std
        assert w.std().item() == pytest.approx(0.9866 * expected, rel=0.04), name
        assert w.abs().max() <= 3 * expected


def test_shallow_cores_carry_gradients_through_every_iteration():
    """Up to a mean of 8; deeper ones through the last 8."""
    found = {mean: model_of(mean_recurrence=mean).config for mean in (1, 8, 9, 32)}
    assert {m: (c.max_recurrence, c.backprop_depth) for m, c in found.items()} == {
        1: (4, 4), 8: (32, 32), 9: (36, 8), 32: (128, 8),
    }  # fmt: skip
    assert model_of(mean_recurrence=4, max_recurrence=6).config.backprop_depth == 6
    assert model_of(mean_recurrence=20, backprop_depth=3).config.backprop_depth == 3


@pytest.mark.parametrize("words", ["0,0,0", "1,2", "1,0,1", "a,b,c", "1,-1,1", "", "1,2,3,4"])
def test_depths_are_refused_in_a_line(words):
    with pytest.raises(UsageError, match="recurrent.* is not PRELUDE,CORE,CODA"):
        ModelConfig(**{**SHAPE, "recurrent": words})


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="max_recurrence 3 is below mean_recurrence 4"):
        model_of(max_recurrence=3)
    with pytest.raises(UsageError, match="huginn needs norm rmsnorm"):
        model_of(norm="layernorm")
    with pytest.raises(ValueError, match="recurrence 0: expected 1 or more"):
        model_of()(text(), recurrence=0)
    with pytest.raises(ValueError, match="recurrence 2: the model has no core"):
        model_of(recurrent=None, n_layer=2)(text(), recurrence=2)


# Generation.


def sampled(model: GPT, prompts, **options) -> list[list[int]]:
    made = [[] for _ in prompts]
    for token in generated(model, prompts, max_tokens=9, seed=4, **options):
        made[token.row].append(token.id)
    return made


@broad("style", STYLES)
@pytest.mark.parametrize(
    "options", [{}, {"position": "alibi", "window": 5}, {"n_kv_head": 1}], ids=str
)
def test_a_full_cache_changes_no_token(style, options):
    """Ragged rows, and beyond the context's end; at the mean, below and above it."""
    model = model_of(recurrence_style=style, **options).eval()
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [7], [3, 4]]
    for r in (1, 4, 7):
        cached = sampled(model, prompts, recurrence=r)
        assert cached == sampled(model, prompts, recurrence=r, use_cache=False)
    assert len({token for row in cached for token in row}) > 5


def test_a_row_is_what_it_is_alone():
    """Whatever stands beside it, and start states and draws are its sample's."""
    model = model_of().eval()
    prompts = [[1, 2, 3], [7], [3, 4, 5, 6]]
    for cache in ("full", "slot"):
        together = sampled(model, prompts, recurrent_cache=cache)
        for i, prompt in enumerate(prompts):
            alone = sampled(model, [prompt], samples=[i], recurrent_cache=cache)
            assert alone == [together[i]]


def slot_oracle(model: GPT, tokens: list[int], prefix: int, r: int) -> torch.Tensor:
    """(T - prefix, V) logits of single tokens after a prefix read at once, written out: each block
    of the core sees, of the tokens before, keys and values of their last iteration.
    """
    held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    prelude, core, coda = model.config.depths
    found = []

    def run(block: int, x: torch.Tensor, at: slice, past) -> torch.Tensor:
        b = model.blocks[block]
        c, T = model.config, x.shape[1]
        heads = b.attention.qkv(b.attention_norm(x)).view(1, T, -1, c.d_head)
        q, k, v = heads.split((c.n_head, c.n_kv_head, c.n_kv_head), dim=2)
        q, k = REFERENCE.rope(
            q,
            k,
            model.position.cos[at],
            model.position.sin[at],
            b.attention.q_norm,
            b.attention.k_norm,
        )
        keys = k if past is None else torch.cat((past[0], k), 1)
        values = v if past is None else torch.cat((past[1], v), 1)
        held[block] = keys, values
        y = b.attention.out(REFERENCE.decode_attention(q, keys, values).flatten(2))
        post, pre = b.attention_post_norm.weight, b.mlp_norm.weight
        y, x = REFERENCE.sandwich_norm(y, x, post, pre)
        return b.mlp_post_norm(b.mlp(y) + x)

    for start, stop in [(0, prefix), *((t, t + 1) for t in range(prefix, len(tokens)))]:
        before, at = dict(held), slice(start, stop)
        x = model.embed(torch.tensor([tokens[at]])) * model.config.d_model**0.5
        for i in range(prelude):
            x = run(i, x, at, before.get(i))
        text = model.injection.prepare(x)
        s = start_noise(torch.zeros(1, dtype=torch.int64), torch.arange(start, stop), 16, x.dtype)
        for _ in range(r):
            s = model.injection(s, text)
            for i in range(prelude, prelude + core):
                s = run(i, s, at, before.get(i))
        x = model.norm(s)
        for i in range(prelude + core, prelude + core + coda):
            x = run(i, x, at, before.get(i))
        found.append(model.logits(model.norm(x))[0, -1])
    return torch.stack(found[1:])


@torch.no_grad()
def test_a_slot_cache_is_its_own_oracle():
    model, tokens = model_of().eval(), text(1)[0].tolist()
    cache = model.make_cache(1)
    model.trunk(torch.tensor([tokens[:5]]), cache, 3)
    ours = [model.logits(model.trunk(torch.tensor([[t]]), cache, 3))[0, 0] for t in tokens[5:]]
    torch.testing.assert_close(torch.stack(ours), slot_oracle(model, tokens, 5, 3))
    full = model.logits(model.trunk(torch.tensor([tokens]), None, 3))[0, 5:]
    assert not torch.allclose(torch.stack(ours), full, atol=1e-3)  # it is another computation


def test_a_slot_cache_does_not_grow_with_the_recurrence():
    model = model_of().eval()
    of_slot = model.make_cache(2).k.numel()
    assert of_slot == model.make_cache(2, recurrence=1).k.numel()
    assert [model.make_cache(2, recurrence=r).k.shape[0] for r in (1, 4, 9)] == [4, 10, 20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recurrence": 0}, "^recurrence 0 is out of range; expected between 1 and"),
        ({"recurrence": -1}, "^recurrence -1 is out of range; expected between 1 and"),
        ({"recurrence": 10**9}, "^recurrence 1000000000 is out of range"),
        ({"recurrent_cache": "half"}, "recurrent_cache .half. is not one of full, slot"),
    ],
)
def test_wrong_recurrences_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        sampled(model_of(), [[1]], **options)
    with pytest.raises(UsageError, match="^recurrence: this model has no core"):
        sampled(model_of(recurrent=None, n_layer=1), [[1]], recurrence=2)
