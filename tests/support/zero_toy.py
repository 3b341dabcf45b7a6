"""A small model with everything in it that is hard to shard, and its training on some ranks."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from minillm.distributed.ranks import Ranks
from minillm.distributed.zero import ZeroOptimizer
from minillm.ops import EAGER
from minillm.optim.adamw import AdamW
from minillm.optim.muon import Muon

ROWS = 16  # sequences a step
BUCKET_MB = 1703 * 4 / 2**20  # 1703 elements of fp32: cuts Toy into at least five buckets
MATRICES = {"loop": (24,), "up": (35, 35), "down": (24,), "wide": (24,), "never": (9,)}


class Toy(nn.Module):
    """Tied (embed), looped (loop), unused (never), used by some rows (sometimes), 0-d, empty.

    forward(rows (n, t) int64, indices (n,)) -> the sum of the rows' shares of the step's loss.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, recompute: bool | None = None) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(0)
        shapes = {
            "embed": (40, 24), "sometimes": (24,), "loop": (24, 24), "up": (70, 24),
            "down": (24, 70), "bias": (5,), "gain": (), "wide": (24, 24), "empty": (0, 7),
            "never": (9, 3),
        }  # fmt: skip
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=numbers, dtype=torch.float64) * 0.3
            self.register_parameter(name, nn.Parameter(values.to(dtype)))
        self.recompute = recompute  # the loop's body: None: no, else whether re-entrantly

    def _body(self, x: Tensor) -> Tensor:
        return x + torch.tanh(F.linear(x, self.loop))

    def forward(self, rows: Tensor, indices: Tensor) -> Tensor:
        x = F.embedding(rows[:, :-1], self.embed)
        if (indices < 2).any():
            x = x + self.sometimes * (indices < 2).to(x.dtype).view(-1, 1, 1)
        for _ in range(3):
            if self.recompute is None:
                x = self._body(x)
            else:
                x = checkpoint(self._body, x, use_reentrant=self.recompute)
        x = x + F.linear(torch.tanh(F.linear(x, self.up)), self.down)
        x = torch.tanh(F.linear(x, self.wide)) * self.gain
        logits = F.linear(x, self.embed)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(wide.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
        extra = self.bias.square().sum() * len(rows) + self.empty.sum()
        return (loss / (rows.shape[1] - 1) + extra) / ROWS


class Record(Optimizer):
    """Moves nothing and remembers the gradients."""

    def __init__(self, params: list[dict]) -> None:
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Keep each gradient, times one so that it is a copy."""
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is not None:
                self.state[p]["gradient"] = p.grad * 1


def rows_of(step: int) -> Tensor:
    """The sequences of a step, (ROWS, 7) int64."""
    return torch.randint(40, (ROWS, 7), generator=torch.Generator().manual_seed(100 + step))


def micro_batches(step: int, ranks: Ranks, accumulate: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's (rows, their indices) of each micro-batch."""
    rows, n = rows_of(step), ROWS // (accumulate * ranks.size)
    for m in range(accumulate):
        indices = torch.arange(n) + (m * ranks.size + ranks.rank) * n
        yield rows[indices], indices


def backward(
    model: Toy, zeros: list[ZeroOptimizer], step: int, ranks: Ranks, accumulate: int = 1
) -> float:
    """The gradients of a step into the optimisers; its loss over all ranks."""
    total = torch.zeros((), dtype=torch.float64)
    for m, batch in enumerate(micro_batches(step, ranks, accumulate), 1):
        with ExitStack() as stack:
            for zero in zeros:
                stack.enter_context(zero.synced(m == accumulate))
            loss = model(*batch)
            loss.backward()
        total += loss.detach()
    return float(ranks.sum(total))


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters by name."""
    return dict(model.named_parameters())


def groups_of(names: list[str]) -> list[dict]:
    """Two groups: matrices that decay and what does not."""
    flat = ("bias", "gain", "sometimes")
    return [
        {"params": [n for n in names if n not in flat], "weight_decay": 0.1, "rate": 1.0},
        {"params": [n for n in names if n in flat], "weight_decay": 0.0, "rate": 0.5},
    ]


def adamw(groups: list[dict]) -> AdamW:
    """The house's AdamW as the tests use it."""
    return AdamW(groups, EAGER, lr=3e-3)


def muon(groups: list[dict]) -> Muon:
    """Muon in fp64 to the last product."""
    return Muon(groups, EAGER, lr=0.01, dtype=torch.float64)


def make_zero(
    model: Toy, ranks: Ranks, make: Callable = adamw, names: list[str] | None = None, **options
) -> ZeroOptimizer:
    """The optimiser of these parameters of the model (None: of all)."""
    parameters = {n: p for n, p in named(model).items() if names is None or n in names}
    options = {"bucket_mb": BUCKET_MB, "group": ranks.optimizer_group(0), **options}
    return ZeroOptimizer(parameters, groups_of(list(parameters)), make, ranks, **options)


def pair_groups(model: Toy) -> tuple[list[dict], list[dict]]:
    """Groups for Muon, the matrices of blocks, and for AdamW, the rest."""
    matrices = [
        {"params": ["up", "never", "down"], "weight_decay": 0.1, "rate": 1.0},
        {"params": ["loop", "wide"], "weight_decay": 0.0, "rate": 1.0},
    ]
    for group in matrices:
        group["parts"] = [MATRICES[n] for n in group["params"]]
    return matrices, groups_of([n for n in named(model) if n not in MATRICES])


def make_pair(model: Toy, ranks: Ranks, **options) -> list[ZeroOptimizer]:
    """Muon for the matrices, whole, and AdamW for the rest."""
    made = []
    for lane, (groups, make) in enumerate(zip(pair_groups(model), (muon, adamw), strict=True)):
        names = {n for group in groups for n in group["params"]}
        own = {n: p for n, p in named(model).items() if n in names}
        made.append(
            ZeroOptimizer(
                own, groups, make, ranks, group=ranks.optimizer_group(lane),
                **{"bucket_mb": BUCKET_MB, "whole": make is muon, **options},
            )
        )  # fmt: skip
    return made


def plain(groups: list[dict], make: Callable, model: Toy) -> Optimizer:
    """The optimiser of one process that knows nothing of ranks."""
    return make([{**g, "params": [named(model)[n] for n in g["params"]]} for g in groups])


def train(
    model: Toy, zeros: list[ZeroOptimizer], ranks: Ranks, steps: range, accumulate: int = 1
) -> list[float]:
    """Losses of these steps, with the gradients' norm clipped at a half."""
    losses = []
    for step in steps:
        losses.append(backward(model, zeros, step, ranks, accumulate))
        norm = ranks.sum(sum(zero.squares() for zero in zeros)).sqrt()
        for zero in zeros:
            zero.step((0.5 / norm).clamp(max=1.0).float())
    return losses
