"""The registry of optimisers: what an entry states is what its optimisers do, in every wing."""

from dataclasses import fields, replace

import pytest
import torch

from minillm.config.model import ModelConfig
from minillm.config.train import TrainConfig
from minillm.errors import UsageError
from minillm.model.gpt import GPT
from minillm.ops import EAGER
from minillm.optim.build import OPTIMIZERS, make_optimizers, set_learning_rate, state_kinds
from minillm.optim.recipe import COUNT, OptimizerKind, Parameters, Recipe
from minillm.planning.estimate import Job, memory, refusal

SHAPE = ModelConfig(vocab_size=11, seq_len=8, n_layer=2, n_head=2, d_model=8)


class Sign(torch.optim.Optimizer):
    """Momentum of which only the sign moves the weights, as in Lion."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure=None, grad_scale=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.lerp_(p.grad if grad_scale is None else p.grad * grad_scale, 0.1)
                p.sub_(m.sign(), alpha=group["lr"])


def sign_recipes(parameters: Parameters) -> list[Recipe]:
    return [Recipe(Sign, parameters.groups(rate=1.0))]


@pytest.fixture
def added(monkeypatch):
    """An optimiser that nothing but its line in the registry knows of."""
    states = frozenset(("momentum",))
    monkeypatch.setitem(OPTIMIZERS, "sign", OptimizerKind(sign_recipes, states, states))


def test_the_choices_on_the_command_line_are_the_registry():
    choices = {f.name: f.metadata.get("choices") for f in fields(TrainConfig)}
    assert set(choices["optimizer"]) == OPTIMIZERS.keys()


@pytest.mark.parametrize("name", [*OPTIMIZERS, "sign"])
def test_the_states_are_those_that_are_kept(name, added):
    model = GPT(SHAPE, EAGER)
    parameters = dict(model.named_parameters())
    optimizers = make_optimizers(name, parameters, model.matrices(), EAGER, (0.9, 0.95), 0.1)
    set_learning_rate(optimizers, 0.01)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
    kept = {}
    for optimizer in optimizers:
        optimizer.step(grad_scale=torch.tensor(0.5))
        kept |= optimizer.state
    assert not any(before[n].equal(p) for n, p in parameters.items())
    stated = state_kinds(name, parameters, model.matrices())
    assert {n: frozenset(kept[p]) for n, p in parameters.items()} == stated
    # The memory that is planned for them is the memory that they take.
    held = sum(x.nbytes for p in kept for kind, x in kept[p].items() if kind != COUNT)
    assert memory(Job(SHAPE, batch_size=1, optimizer=name), 0)["moments"] == held


def test_only_an_optimiser_of_whole_matrices_is_refused_at_stage_3(added, monkeypatch):
    refused = {name for name in OPTIMIZERS if refusal(Job(SHAPE, optimizer=name), 3)}
    assert refused == {"muon"}
    monkeypatch.setitem(OPTIMIZERS, "sign", replace(OPTIMIZERS["sign"], whole=True))
    assert refusal(Job(SHAPE, optimizer="sign"), 3)


def test_the_settings_refuse_stage_3_for_the_same_optimisers():
    refused = set()
    for name in OPTIMIZERS:
        try:
            TrainConfig(optimizer=name, zero=3)
        except UsageError:
            refused.add(name)
    assert refused == {name for name, kind in OPTIMIZERS.items() if kind.whole} != set()
