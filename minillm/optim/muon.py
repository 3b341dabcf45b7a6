"""Muon: orthogonalised momentum for the matrices of blocks, and AdamW for all other parameters."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from minillm.ops import Ops
from minillm.optim import adamw
from minillm.optim.recipe import OptimizerKind, Parameters, Recipe

# Multiples of the learning rate (which is one for matrices, about 0.02) at which AdamW moves the
# parameters that are no matrix of a block. Measured on the default corpus, see benchmarks/.
EMBED_RATE, HEAD_RATE, VECTOR_RATE = 0.5, 0.1, 0.5


class Muon(Optimizer):
    """Orthogonalised momentum: every singular direction of a matrix moves equally far.

        m <- momentum m + g;   u = newton_schulz(g + momentum m)
        w <- (1 - lr wd) w - lr sqrt(max(1, rows / columns)) u

    params: groups of matrices (rows, columns); group["parts"] lists for each matrix the row counts
        of the independent maps that are stacked in it (queries, keys, values), each of which is
        orthogonalised by itself
    dtype: dtype of the products in Newton-Schulz, for which bf16 is enough; updates are
        normalised before they are rounded to it

    Matrices of equal shape go through Newton-Schulz in one batch.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers"; decay: Liu et al. 2025,
    arXiv:2502.16982, eq. 2.
    """

    def __init__(
        self,
        params: Iterable[dict],
        ops: Ops,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.ops, self.dtype = ops, dtype

    @torch.no_grad()
    def step(self, closure=None, grad_scale: Tensor | None = None) -> None:
        """Move every parameter that has a gradient.

        closure: not used; torch passes it
        grad_scale: () factor of all gradients; None: 1
        """
        for group in self.param_groups:
            updates: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for w, parts in zip(group["params"], group["parts"], strict=True):
                if w.grad is None:
                    continue
                w.mul_(1 - group["lr"] * group["weight_decay"])
                u = self._nesterov(w, group["momentum"], grad_scale)
                for piece, update in zip(w.split(parts), u.split(parts), strict=True):
                    updates.setdefault(piece.shape, []).append((piece, update))
            for shape, pairs in updates.items():
                stacked = torch.stack([u for _, u in pairs])
                directions = self.ops.newton_schulz(stacked, dtype=self.dtype)
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for (piece, _), direction in zip(pairs, directions, strict=True):
                    piece.add_(direction, alpha=-rate)

    def _nesterov(self, w: Tensor, momentum: float, grad_scale: Tensor | None) -> Tensor:
        """Add the gradient to the momentum of w. Return g + momentum m."""
        gradient = w.grad if grad_scale is None else w.grad * grad_scale
        state = self.state[w]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(w)
        state["momentum"].mul_(momentum).add_(gradient)
        return gradient.add(state["momentum"], alpha=momentum)


def muon_recipes(parameters: Parameters) -> list[Recipe]:
    """Return Muon for the matrices of blocks, AdamW for all other parameters."""

    def make(groups: list[dict]) -> Optimizer:
        return Muon(groups, parameters.ops, lr=0.0, dtype=parameters.dtype)

    return [
        Recipe(make, _matrix_groups(parameters), whole=True),
        adamw.adamw_recipe(parameters, _other_groups(parameters)),
    ]


def _matrix_groups(parameters: Parameters) -> list[dict]:
    """Return groups of the matrices of blocks: those that decay, those that do not."""
    groups = []
    for decays in (True, False):
        chosen = {
            name: parts
            for name, parts in parameters.matrices.items()
            if (name not in parameters.undecayed) == decays
        }
        group = {
            "params": list(chosen),
            "parts": list(chosen.values()),
            "weight_decay": parameters.weight_decay if decays else 0.0,
            "rate": 1.0,
        }
        groups.append(group)
    return [group for group in groups if group["params"]]


def _other_groups(parameters: Parameters) -> list[dict]:
    """Return groups of the other parameters: embeddings, the head, vectors."""
    outer = [name for name in parameters.wide if name not in parameters.matrices]
    groups = [
        {"params": [n for n in outer if not n.startswith("head.")], "rate": EMBED_RATE},
        {"params": [n for n in outer if n.startswith("head.")], "rate": HEAD_RATE},
        {"params": parameters.vectors, "rate": VECTOR_RATE},
    ]
    return [group for group in groups if group["params"]]


MUON = OptimizerKind(
    recipes=muon_recipes,
    matrix_states=frozenset(("momentum",)),
    other_states=adamw.STATES,
    whole=True,
)
