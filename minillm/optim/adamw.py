"""AdamW, which moves all parameters of a step by one call of the table of operations."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from minillm.ops import Ops
from minillm.optim.recipe import COUNT, OptimizerKind, Parameters, Recipe


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, whose step is one call of the operation `adamw`; the state is PyTorch's own.

    See minillm.kernels.reference.optim.adamw for the formula.

    Source: Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[dict],
        ops: Ops,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)
        self.ops = ops

    @torch.no_grad()
    def step(self, closure=None, grad_scale: Tensor | None = None) -> None:
        """Move every parameter that has a gradient.

        closure: not used; torch passes it
        grad_scale: () factor of all gradients; None: 1
        """
        # Parameters with the same count of steps and the same constants share a call: usually all.
        calls: dict[tuple, list[tuple[Tensor, float, float]]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                rates = group["lr"], group["weight_decay"]
                call = int(state["step"]), tuple(group["betas"]), group["eps"]
                calls.setdefault(call, []).append((p, *rates))
        for (step, betas, eps), members in calls.items():
            params = [p for p, _, _ in members]
            self.ops.adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                step,
                lr=[rate for _, rate, _ in members],
                weight_decay=[decay for _, _, decay in members],
                betas=betas,
                eps=eps,
                grad_scale=grad_scale,
            )


def adamw_recipe(parameters: Parameters, groups: list[dict]) -> Recipe:
    """Return the recipe of AdamW for these groups of the parameters.

    parameters: parameters of the model, and the settings of the optimiser
    groups: groups of their names, as in Recipe
    """

    def make(built: list[dict]) -> Optimizer:
        return AdamW(built, parameters.ops, lr=0.0, betas=parameters.betas)

    return Recipe(make, groups)


STATES = frozenset((COUNT, "exp_avg", "exp_avg_sq"))
ADAMW = OptimizerKind(
    recipes=lambda parameters: [adamw_recipe(parameters, parameters.groups(rate=1.0))],
    matrix_states=STATES,
    other_states=STATES,
)
