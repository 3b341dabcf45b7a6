"""Describe an optimiser before it has parameters: its recipe, and its entry in the registry.

The registry itself is in build.py.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minillm.ops import Ops

COUNT = "step"  # the state that is one number for a whole parameter, not one for each element


@dataclass(frozen=True)
class Recipe:
    """An optimiser that has no parameters yet.

    make: returns the optimiser of groups of tensors
    groups: groups of a torch optimiser, but with names for "params"; the `rate` of each is its
        factor of the learning rate
    whole: whether matrices must not be cut into shards
    """

    make: Callable[[list[dict]], Optimizer]
    groups: list[dict]
    whole: bool = False

    def build(self, parameters: dict[str, Tensor]) -> Optimizer:
        """Return the optimiser of these parameters."""
        return self.make([{**g, "params": [parameters[n] for n in g["params"]]}
                          for g in self.groups])  # fmt: skip


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model and the settings that its optimisers are built with.

    named: all parameters, by name
    matrices: the names of the matrices in blocks, each with the row counts of the independent maps
        that are stacked in it (queries, keys, values)
    ops: the table of operations
    betas: AdamW's decay rates
    weight_decay: weight decay of the parameters that decay
    dtype: dtype of the computation
    undecayed: the names of matrices that do not decay
    """

    named: dict[str, nn.Parameter]
    matrices: dict[str, tuple[int, ...]]
    ops: Ops
    betas: tuple[float, float]
    weight_decay: float
    dtype: torch.dtype = torch.float32
    undecayed: Collection[str] = ()

    @property
    def wide(self) -> list[str]:
        """The names of the parameters of two dimensions and more."""
        return [name for name, p in self.named.items() if p.dim() >= 2]

    @property
    def vectors(self) -> list[str]:
        """The names of the parameters of less than two dimensions."""
        return [name for name, p in self.named.items() if p.dim() < 2]

    def groups(self, **options: Any) -> list[dict]:
        """Return groups of all parameters: matrices and embeddings decay, the others do not.

        options: more entries of each group
        """
        decayed = [name for name in self.wide if name not in self.undecayed]
        others = [name for name in self.wide if name in self.undecayed] + self.vectors
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay, **options},
            {"params": others, "weight_decay": 0.0, **options},
        ]
        return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class OptimizerKind:
    """An entry of the registry: one value of `--optimizer`.

    recipes: returns the optimisers of a model's parameters
    matrix_states: the names of the tensors that are kept for each matrix of a block
    other_states: the same for every other parameter
    whole: whether matrices must not be cut into shards, as stage 3 of ZeRO does
    """

    recipes: Callable[[Parameters], list[Recipe]]
    matrix_states: frozenset[str]
    other_states: frozenset[str]
    whole: bool = False

    @property
    def matrix_copies(self) -> int:
        """The number of state values kept for each element of a matrix of a block."""
        return len(self.matrix_states - {COUNT})

    @property
    def other_copies(self) -> int:
        """The number of state values kept for each element of every other parameter."""
        return len(self.other_states - {COUNT})
