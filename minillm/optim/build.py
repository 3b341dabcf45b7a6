"""Muon, parameter groups and weight averaging. The optimisers see parameters, never a model."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minillm.ops import Ops

# Under Muon, AdamW keeps what is not a matrix of a block, at these multiples of the learning rate
# (which is one for matrices, about 0.02): measured on the default corpus, see benchmarks/.
PIECE = 1 << 12  # elements whose squares fp32 adds up to 1e-8
EMBED_RATE, HEAD_RATE, VECTOR_RATE = 0.5, 0.1, 0.5


class Muon(Optimizer):
    """Momentum, orthogonalised: every singular direction of a matrix moves equally far.

        m <- momentum m + g;   u = newton_schulz(g + momentum m)
        w <- (1 - lr wd) w - lr sqrt(max(1, rows / columns)) u

    params: groups of matrices (rows, columns); group["parts"] lists for each the row counts of the
    independent maps stacked in it (queries, keys, values: each is orthogonalised by itself).
    dtype: of the products in Newton-Schulz; bf16 is enough. Updates are normalised before they are
    rounded to it.
    Matrices of equal shape go through it in one batch.
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
        """Move every parameter that has a gradient; grad_scale: () factor of the gradients."""
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
        gradient = w.grad if grad_scale is None else w.grad * grad_scale
        state = self.state[w]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(w)
        state["momentum"].mul_(momentum).add_(gradient)
        return gradient.add(state["momentum"], alpha=momentum)


@dataclass(frozen=True)
class Recipe:
    """An optimiser before it has parameters.

    make: from groups of tensors.    groups: as torch's, but with names for "params"; each carries
    `rate`, its share of the learning rate.    whole: matrices must not be cut into shards.
    """

    make: Callable[[list[dict]], Optimizer]
    groups: list[dict]
    whole: bool = False

    def build(self, parameters: dict[str, Tensor]) -> Optimizer:
        """The optimiser of these parameters."""
        return self.make([{**g, "params": [parameters[n] for n in g["params"]]}
                          for g in self.groups])  # fmt: skip


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
    """The optimisers for named parameters.

    name: "adamw" (matrices and embeddings decay, vectors do not) or "muon" (AdamW for the rest).
    matrices: the parameters that are matrices of blocks, with their parts; see Muon.
    dtype: of the computation, for Muon's products.    undecayed: matrices that do not decay either.
    """
    wide = [n for n, p in parameters.items() if p.dim() >= 2]
    vectors = [n for n, p in parameters.items() if p.dim() < 2]

    def adamw(groups: list[dict]) -> Optimizer:
        return AdamW(groups, ops, lr=0.0, betas=betas)

    if name == "adamw":
        groups = [
            {"params": [n for n in wide if n not in undecayed], "weight_decay": weight_decay},
            {"params": [n for n in wide if n in undecayed] + vectors, "weight_decay": 0.0},
        ]
        return [Recipe(adamw, [{**g, "rate": 1.0} for g in groups if g["params"]])]
    outer = [n for n in wide if n not in matrices]
    groups = [
        {"params": [n for n in outer if not n.startswith("head.")], "rate": EMBED_RATE},
        {"params": [n for n in outer if n.startswith("head.")], "rate": HEAD_RATE},
        {"params": vectors, "rate": VECTOR_RATE},
    ]
    decays = {True: weight_decay, False: 0.0}
    muon = [
        {
            "params": [n for n in matrices if (n not in undecayed) == decaying],
            "parts": [parts for n, parts in matrices.items() if (n not in undecayed) == decaying],
            "weight_decay": decay,
            "rate": 1.0,
        }
        for decaying, decay in decays.items()
    ]
    whole = [g for g in muon if g["params"]]
    return [
        Recipe(lambda groups: Muon(groups, ops, lr=0.0, dtype=dtype), whole, whole=True),
        Recipe(adamw, [g for g in groups if g["params"]]),
    ]


def state_kinds(
    name: str, parameters: Iterable[str], matrices: Collection[str]
) -> dict[str, frozenset[str]]:
    """What the optimisers of `recipes` keep of each parameter once they have stepped."""
    adamw, muon = frozenset(("step", "exp_avg", "exp_avg_sq")), frozenset(("momentum",))
    return {n: muon if name == "muon" and n in matrices else adamw for n in parameters}


def make_optimizers(
    name: str, parameters: dict[str, nn.Parameter], *args: Any, **options: Any
) -> list[Optimizer]:
    """The optimisers of `recipes`, of these parameters."""
    return [r.build(parameters) for r in recipes(name, parameters, *args, **options)]


def set_learning_rate(optimizers: Iterable[Optimizer], learning_rate: float) -> None:
    """Give each group its share of the rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]


def squares(tensors: list[Tensor]) -> Tensor:
    """The sum of all squares, () fp64, to 1e-8.

    Where there is no fp64 norm (on a CPU it is slow, on MPS it is not there) of norms of small
    pieces: torch's fp32 norm of millions of elements is off by 1e-4. It lies on the CPU then.
    """
    tensors = [x for x in tensors if x.numel()]
    if not tensors:
        return torch.zeros((), dtype=torch.float64)  # of a rank that holds nothing
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square().sum()
    norms = torch._foreach_norm([p for x in tensors for p in x.reshape(-1).split(PIECE)])
    return torch.stack(norms).cpu().double().square().sum()


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, all parameters of all groups stepped by one call of the table's operation.

    See minillm.kernels.reference.optim.adamw for the formula. The state is PyTorch's own.
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
        """Move every parameter that has a gradient; grad_scale: () factor of the gradients."""
        # Parameters of as many steps and the same constants go together: as a rule all of them.
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


class Average:
    """Exponential moving average of the weights, fp32: a <- a + (1 - decay) (w - a).

    The decay of step n is min(decay, (1 + n) / (10 + n)), so that the start is forgotten soon.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.weights = {n: p.detach().float().clone() for n, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in self.parameters.items():
            self.weights[name].lerp_(p.float(), 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model holds the average inside the `with`, its own weights after it."""
        own = {n: p.detach().clone() for n, p in self.parameters.items()}
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(own[name])
