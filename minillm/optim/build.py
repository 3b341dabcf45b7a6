"""Build the optimisers of a model from the registry of optimisers.

To add one, write its file as adamw.py is written, add its line to OPTIMIZERS, and its name to the
choices of `optimizer` in config/train.py.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from minillm.ops import Ops
from minillm.optim.adamw import ADAMW
from minillm.optim.muon import MUON
from minillm.optim.recipe import OptimizerKind, Parameters, Recipe

OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": ADAMW,
    "muon": MUON,
}


def recipes(
    name: str,
    parameters: dict[str, nn.Parameter],
    matrices: dict[str, tuple[int, ...]],
    ops: Ops,
    betas: tuple[float, float],
    weight_decay: float,
    dtype: torch.dtype = torch.float32,
    undecayed: Collection[str] = (),
) -> list[Recipe]:
    """Return the optimisers of a model, which have no parameters yet.

    name: a key of OPTIMIZERS
    parameters, matrices, ops, betas, weight_decay, dtype, undecayed: see recipe.Parameters
    """
    wanted = Parameters(parameters, matrices, ops, betas, weight_decay, dtype, undecayed)
    return OPTIMIZERS[name].recipes(wanted)


def state_kinds(
    name: str, parameters: Iterable[str], matrices: Collection[str]
) -> dict[str, frozenset[str]]:
    """Return the states that the optimisers of `recipes` keep for each parameter after a step.

    name: a key of OPTIMIZERS
    parameters: names of all parameters
    matrices: names of the matrices in blocks
    """
    kind = OPTIMIZERS[name]
    return {n: kind.matrix_states if n in matrices else kind.other_states for n in parameters}


def make_optimizers(
    name: str, parameters: dict[str, nn.Parameter], *args: Any, **options: Any
) -> list[Optimizer]:
    """Return the optimisers of `recipes`, built for these parameters.

    name: a key of OPTIMIZERS
    parameters: all parameters, by name
    *args, **options: further arguments of `recipes`
    """
    return [r.build(parameters) for r in recipes(name, parameters, *args, **options)]


def set_learning_rate(optimizers: Iterable[Optimizer], learning_rate: float) -> None:
    """Set the rate of each group to `learning_rate` times its factor `rate`.

    optimizers: optimisers whose groups have a "rate"
    learning_rate: learning rate of the step
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]
