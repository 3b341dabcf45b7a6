"""Muon against a loop over single matrices; groups, rates and the average."""

import math
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from minillm.config.train import ModelConfig
from minillm.model.gpt import GPT
from minillm.ops import EAGER, REFERENCE
from minillm.optim.adamw import AdamW
from minillm.optim.build import make_optimizers, set_learning_rate
from minillm.optim.ema import Average
from minillm.optim.muon import EMBED_RATE, HEAD_RATE, VECTOR_RATE, Muon


def random_matrix(generator, rows, columns):
    return nn.Parameter(torch.randn(rows, columns, generator=generator, dtype=torch.float64))


def orthogonal(u):
    """Five steps of the quintic on one matrix, the short side first."""
    x = u / (math.sqrt((u * u).sum()) + 1e-7)
    if x.shape[0] > x.shape[1]:
        return orthogonal(u.T).T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x


def test_muon_is_a_loop_over_single_maps(generator):
    lr, momentum, decay = 0.03, 0.9, 0.2
    shapes = {(12, 6): (6, 3, 3), (6, 6): (6,), (20, 6): (10, 10), (6, 10): (6,)}
    ours = [random_matrix(generator, *shape) for shape in shapes]
    ours += [random_matrix(generator, *shape) for shape in shapes]
    parts = [*shapes.values(), *shapes.values()]
    theirs = [w.detach().clone() for w in ours]
    speeds = [torch.zeros_like(w) for w in theirs]
    group = {"params": ours, "parts": parts}
    optimizer = Muon([group], EAGER, lr, momentum, decay, dtype=torch.float64)
    for _ in range(3):
        for i, w in enumerate(ours):
            w.grad = torch.randn(w.shape, generator=generator, dtype=torch.float64)
            speeds[i] = momentum * speeds[i] + w.grad
            u = w.grad + momentum * speeds[i]
            theirs[i] = theirs[i] * (1 - lr * decay)
            start = 0
            for rows in parts[i]:
                piece = slice(start, start + rows)
                gain = math.sqrt(max(1, rows / w.shape[1]))
                theirs[i][piece] -= lr * gain * orthogonal(u[piece])
                start += rows
        optimizer.step()
    for w, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-12 * 3.4445**5)


def test_muon_takes_stacked_maps_apart(generator):
    """A small map beside a large one still moves as far."""
    w = random_matrix(generator, 12, 6)
    before = w.detach().clone()
    w.grad = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    w.grad[8:] *= 1e-4
    Muon([{"params": [w], "parts": [(8, 4)]}], EAGER, lr=1.0, dtype=torch.float64).step()
    moved = torch.linalg.svdvals(before[8:] - w.detach()[8:])
    assert moved.min() > 0.6 and moved.max() < 1.3


def test_muon_leaves_what_has_no_gradient(generator):
    still, moving = random_matrix(generator, 4, 4), random_matrix(generator, 4, 4)
    before = still.detach().clone()
    moving.grad = torch.ones_like(moving)
    group = {"params": [still, moving], "parts": [(4,), (4,)]}
    optimizer = Muon([group], EAGER, weight_decay=0.5)
    optimizer.step()
    assert still.equal(before) and still not in optimizer.state


def test_muon_multiplies_in_the_dtype_it_is_given(generator):
    seen = []

    def newton_schulz(g, dtype):
        seen.append(dtype)
        return REFERENCE.newton_schulz(g, dtype=dtype)

    w = nn.Parameter(torch.randn(4, 6, generator=generator))
    w.grad = torch.randn(4, 6, generator=generator)
    group = {"params": [w], "parts": [(4,)]}
    ops = replace(EAGER, newton_schulz=newton_schulz)
    Muon([group], ops, dtype=torch.bfloat16).step()
    assert seen == [torch.bfloat16] and w.dtype == torch.float32


def test_muon_goes_on_from_a_saved_state(generator):
    weights = [random_matrix(generator, 4, 6) for _ in range(2)]
    with torch.no_grad():
        weights[1].copy_(weights[0])
    first, second = (Muon([{"params": [w], "parts": [(4,)]}], EAGER) for w in weights)
    gradients = torch.randn(4, 4, 6, generator=generator, dtype=torch.float64)
    for i, g in enumerate(gradients):
        if i == 2:
            second.load_state_dict(deepcopy(first.state_dict()))
            with torch.no_grad():
                weights[1].copy_(weights[0])
        weights[0].grad, weights[1].grad = g.clone(), g.clone()
        first.step()
        if i >= 2:
            second.step()
    assert weights[0].equal(weights[1])


def test_adamw_steps_each_group_by_its_own_constants(generator):
    """Two groups of other betas and eps, one parameter that joins late: as PyTorch's own."""
    starts = [random_matrix(generator, 4, 6) for _ in range(3)]
    constants = [{"betas": (0.9, 0.95), "eps": 1e-8}, {"betas": (0.5, 0.7), "eps": 1e-2}]
    moved = []
    for make in (partial(AdamW, ops=EAGER), torch.optim.AdamW):
        ws = [torch.nn.Parameter(w.detach().clone()) for w in starts]
        groups = [{"params": ws[:1], **constants[0]}, {"params": ws[1:], **constants[1]}]
        optimizer = make(groups, lr=0.1, weight_decay=0.3)
        numbers = torch.Generator().manual_seed(0)
        for step in range(4):
            for w in ws[: 2 + (step > 1)]:
                w.grad = torch.randn(w.shape, generator=numbers, dtype=w.dtype)
            optimizer.step()
        moved.append(ws)
    for ours, theirs in zip(*moved, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def tiny(**options):
    shape = {"vocab_size": 11, "seq_len": 8, "n_layer": 2, "n_head": 2, "d_model": 8}
    return GPT(ModelConfig(**{**shape, **options}), EAGER)


PARCAE = {"recurrent": "1,1,1", "recurrence_style": "parcae"}
MODELS = [
    PARCAE,
    {"bias": True, "norm": "layernorm", "position": "learned"},
    {"tie_embeddings": True, "qk_norm": True},
    {},
]


def grouped(model, name, decay=0.1):
    """The optimisers, and (group, parameter name) pairs."""
    parameters = dict(model.named_parameters())
    optimizers = make_optimizers(
        name, parameters, model.matrices(), EAGER, (0.8, 0.97), decay, undecayed=model.undecayed()
    )
    names = {id(p): n for n, p in parameters.items()}
    groups = [g for o in optimizers for g in o.param_groups]
    return optimizers, [(g, names[id(p)]) for g in groups for p in g["params"]]


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(name, options):
    model = tiny(**options)
    _, pairs = grouped(model, name)
    assert sorted(n for _, n in pairs) == sorted(n for n, _ in model.named_parameters())
    assert all(g["params"] for g, _ in pairs)


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_adamw_decays_matrices_and_embeddings_only(options):
    model = tiny(**options)
    (optimizer,), pairs = grouped(model, "adamw")
    assert isinstance(optimizer, torch.optim.AdamW)
    for group, name in pairs:
        matrix = model.get_parameter(name).dim() == 2 and name != "injection.text.weight"
        assert group["weight_decay"] == (0.1 if matrix else 0.0), name
        assert group["betas"] == (0.8, 0.97) and group["rate"] == 1.0


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_muon_takes_the_blocks_matrices(options):
    model = tiny(**options)
    (muon, adamw), pairs = grouped(model, "muon")
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    for group, name in pairs:
        still = name in model.undecayed()
        inner = name.startswith("blocks.") and model.get_parameter(name).dim() == 2 or still
        assert (group in muon.param_groups) == inner, name
        assert group["weight_decay"] == (0.1 if inner and not still else 0.0)
        expected = {"head.weight": HEAD_RATE, "embed.weight": EMBED_RATE}
        expected["position.weight"] = EMBED_RATE
        assert group["rate"] == (1.0 if inner else expected.get(name, VECTOR_RATE)), name
    group = muon.param_groups[0]
    for w, parts in zip(group["params"], group["parts"], strict=True):
        assert w.shape[0] == sum(parts)
    shapes = {n: p for (g, n), p in zip(pairs, group["parts"], strict=False)}
    assert shapes["blocks.0.attention.qkv.weight"] == (8, 8, 8)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_group_gets_its_share_of_the_rate(name):
    optimizers, pairs = grouped(tiny(), name)
    set_learning_rate(optimizers, 0.02)
    for group, _ in pairs:
        assert group["lr"] == 0.02 * group["rate"]


@pytest.mark.parametrize("name, rate", [("adamw", 0.02), ("muon", 0.1)])
def test_a_few_steps_learn_a_sentence(name, rate):
    torch.manual_seed(0)
    model = tiny(qk_norm=True)
    optimizers, _ = grouped(model, name)
    set_learning_rate(optimizers, rate)
    tokens = torch.tensor([[1, 5, 2, 7, 3, 9, 4, 10]])
    losses = []
    for _ in range(40):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(11)) < 0.2
    assert losses[-1] < 0.3


def test_average_by_hand():
    w = nn.Parameter(torch.tensor([1.0]))
    average = Average({"w": w}, decay=0.5)
    expected = 1.0
    for step in range(20):
        with torch.no_grad():
            w.fill_(float(step) ** 2)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step**2
        assert average.weights["w"].item() == pytest.approx(expected, rel=1e-6)
    assert w.item() == 19.0**2


def test_average_is_swapped_in_and_out_even_after_an_error():
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    average = Average({"w": w}, decay=0.9)
    assert average.weights["w"].dtype == torch.float32
    with torch.no_grad():
        w.fill_(5.0)
    with average.swapped_in():
        assert w.tolist() == [1.0, 2.0]
    assert w.tolist() == [5.0, 5.0]
    with pytest.raises(KeyError), average.swapped_in():
        raise KeyError
    assert w.tolist() == [5.0, 5.0]
    assert average.weights["w"].tolist() == [1.0, 2.0]
