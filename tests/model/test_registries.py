"""Every name of a configuration has an implementation, and every implementation a name."""

from dataclasses import replace

import pytest
import torch

from minillm.config import model as names
from minillm.config.model import ModelConfig
from minillm.model.gpt import GPT
from minillm.model.injection import INJECTIONS, injection_parameters, make_injection
from minillm.model.mlp import MLPS, make_mlp
from minillm.model.norms import NORMS, make_norm, norm_parameters
from minillm.model.positions import POSITIONS
from minillm.ops import EAGER

SHAPE = ModelConfig(vocab_size=11, seq_len=9, n_layer=2, n_head=2, d_model=16, d_ff=24)
CORE = replace(SHAPE, recurrent="1,1,1")
BIASES = (False, True)


@pytest.mark.parametrize("kind, rows", [
    ("NORMS", NORMS), ("MLPS", MLPS), ("POSITIONS", POSITIONS), ("INJECTIONS", INJECTIONS),
])  # fmt: skip
def test_names_of_flags_are_those_of_the_tables(kind, rows):
    assert tuple(rows) == getattr(names, kind)


def test_gated_mlps_are_those_of_the_table():
    assert tuple(name for name, kind in MLPS.items() if kind.gated) == names.GATED


def size_of(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", NORMS)
def test_norms_count_themselves(name, bias):
    config = replace(SHAPE, norm=name, bias=bias)
    assert size_of(make_norm(config, EAGER)) == norm_parameters(config)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", MLPS)
def test_mlps_describe_their_matrices_and_count_the_rest(name, bias):
    config, kind = replace(SHAPE, mlp=name, bias=bias), MLPS[name]
    made = dict(make_mlp(config, EAGER).named_parameters())
    matrices = kind.matrices(config)
    shapes = {n: (sum(m.rows), m.columns) for n, m in matrices.items()}
    assert shapes == {n: tuple(p.shape) for n, p in made.items() if p.dim() == 2}
    assert kind.vectors(config) == sum(p.numel() for p in made.values() if p.dim() == 1)
    assert kind.flops(config) == 6 * sum(m.elements for m in matrices.values())


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_count_themselves(name):
    config = replace(SHAPE, position=name)
    made, x = POSITIONS[name].build(config), torch.randn(1, 4, 16)
    assert size_of(made) == POSITIONS[name].parameters(config)
    y, rotation = made.encode(x, slice(2, 6)), made.rotation(slice(0, 4))
    assert y.shape == x.shape and torch.equal(y, x) == (name in ("rope", "alibi", "none"))
    assert (rotation is not None) == (name == "rope")
    assert (POSITIONS[name].slopes(config) is not None) == (name == "alibi")


@pytest.mark.parametrize("style", names.STYLES)
@pytest.mark.parametrize("name", INJECTIONS)
def test_injections_count_themselves(name, style):
    config = replace(CORE, injection=name, recurrence_style=style)
    assert size_of(make_injection(config, EAGER)) == sum(injection_parameters(config))
    model = GPT(config, EAGER)
    for name, rows in model.matrices().items():
        w = model.get_parameter(name)
        assert w.dim() == 2 and w.shape[0] == sum(rows)


def test_a_model_chooses_its_operations_on_a_cpu():
    model = GPT(SHAPE)
    assert model.ops.name == "eager" and model.ops.why == "on a CPU"
    with torch.device("meta"):
        assert GPT(SHAPE).ops.name == "eager"
