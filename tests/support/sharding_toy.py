"""Tiny decoders of every kind, their batches, and the truth about them: what one process computes
by plain autograd. For the ranks of test_strategies.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from unittest.mock import patch

import torch
from torch import Tensor

from minillm.config.train import ModelConfig
from minillm.data.batches import IGNORED
from minillm.distributed.agreement import gather
from minillm.distributed.ranks import Ranks
from minillm.distributed.strategies import Sharding, ZeroSharded, shard
from minillm.distributed.zero import ZeroOptimizer
from minillm.model.gpt import GPT
from minillm.model.recurrence import state_keys
from minillm.ops import EAGER
from minillm.optim.build import recipes, set_learning_rate
from minillm.optim.clip import clip_factor
from minillm.training.gradients import accumulate
from tests.support.zero_toy import Record

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
STAGES = (0, 1, 2, 3)
ROWS, TIMEOUT_S = 16, 60.0
EVEN, EMPTY = 1000, 2000  # numbers of steps
SMALL = partial(ModelConfig, vocab_size=37, seq_len=8, d_model=16, n_head=2, d_ff=24)
# 37 rows and 18 columns on 4 ranks; the norms' 5 numbers leave the fourth rank with none.
CASES = {
    "plain": SMALL(n_layer=3, n_kv_head=1),
    "tied": SMALL(n_layer=2, tie_embeddings=True),
    "learned": SMALL(n_layer=2, position="learned", d_model=18, n_head=3, d_head=5, qk_norm=True,
                     bias=True, norm="layernorm", mlp="gelu", seq_len=9),
    "core": SMALL(recurrent="1,2,1", mean_recurrence=3, backprop_depth=2),
}  # fmt: skip
ROUNDS = {"core": (1, 4)}  # one iteration, and four, of which two carry gradients


class Keep(Record):
    """Record where the factor of the gradients is handed over too; they are kept as they come."""

    def step(self, closure=None, grad_scale: Tensor | None = None) -> None:
        """As Record's."""
        super().step(closure)


def made(case: str, dtype: torch.dtype = F32) -> GPT:
    """The same model each time; below fp32 its weights stay fp32."""
    generator = torch.Generator().manual_seed(5)
    return GPT(CASES[case], EAGER, dtype, generator).to(F64 if dtype == F64 else F32)


def sharded(
    model: GPT, ranks: Ranks, stage: int, dtype: torch.dtype = F32, keep: bool = False
) -> Sharding:
    """The model with AdamW, or with Keep; at stages 1 and 2 in small buckets."""
    named = dict(model.named_parameters())
    (recipe,) = recipes("adamw", named, model.matrices(), EAGER, (0.9, 0.95), 0.1, dtype)
    recipe = replace(recipe, make=Keep) if keep else recipe
    with patch(
        "minillm.distributed.strategies.ZeroOptimizer", partial(ZeroOptimizer, bucket_mb=0.004)
    ):
        sharding = shard(model, [recipe], ranks, stage, dtype=dtype)
    if isinstance(sharding, ZeroSharded):
        assert sum(len(optimizer.buckets) for optimizer in sharding.optimizers) >= 4
    set_learning_rate(sharding.optimizers, 0.01)
    return sharding


def batch(case: str, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and targets of a step, (ROWS, T), and keys, (ROWS,).

    A third of the targets does not count, more of them further down, but of steps from EVEN on all
    do. From EMPTY on none does of some rows, which are whole micro-batches of some ranks.
    """
    c, generator = CASES[case], torch.Generator().manual_seed(100 + step)
    text = torch.randint(c.vocab_size, (ROWS, c.seq_len + 1), generator=generator)
    targets = text[:, 1:].clone()
    if step < EVEN:
        share = torch.linspace(0, 0.6, ROWS)[:, None]
        targets[:, 1:][torch.rand(ROWS, c.seq_len - 1, generator=generator) < share] = IGNORED
    if step >= EMPTY:
        targets[[1, 8, 9, 10, 11]] = IGNORED
    return text[:, :-1], targets, state_keys(0, torch.arange(ROWS))


@cache
def truth(case: str, dtype: torch.dtype, step: int) -> tuple[float, dict[str, Tensor]]:
    """The loss of a fresh model and its gradients, by plain autograd, of all rows at once."""
    model, rounds = made(case, dtype), ROUNDS.get(case, (None,))
    tokens, targets, keys = batch(case, step)
    count, total = int((targets != IGNORED).sum()), 0.0
    for group, r in enumerate(rounds):
        x, y, k = (part[group :: len(rounds)] for part in (tokens, targets, keys))
        loss = model(x, y, r, k) * (int((y != IGNORED).sum()) / count)
        loss.backward()
        total += float(loss.detach())
    named = dict(model.named_parameters())
    assert all(p.grad.any() for p in named.values())
    return total, {name: p.grad for name, p in named.items()}


def backward(sharding: Sharding, case: str, step: int, parts: int = 1, scale: float = 1.0) -> float:
    """Gradients of a step, in `parts` micro-batches of each rank where it has so many rows."""
    ranks, rounds = sharding.ranks, ROUNDS.get(case, (None,))
    rows = ROWS // ranks.size
    mine = (x[ranks.rank * rows :][:rows] for x in batch(case, step))
    micro = max(1, rows // len(rounds) // parts)
    return float(accumulate(sharding, *mine, micro, rounds, scale))


def worst_error(sharding: Sharding, gradients: dict[str, Tensor]) -> float:
    """Of what Keep has kept of a step, over all ranks: relative L2 of the worst tensor."""
    wrong, seen = dict.fromkeys(gradients, 0.0), dict.fromkeys(gradients, 0.0)
    for piece in sharding.pieces():
        expected = gradients[piece.name].reshape(-1)[piece.start : piece.stop].double()
        found = piece.state["gradient"].double()
        assert found.shape == expected.shape
        wrong[piece.name] += float((found - expected).square().sum())
        seen[piece.name] += found.numel()
    ranks = sharding.ranks
    counts = ranks.sum(torch.tensor(list(seen.values()), dtype=F64)).tolist()
    assert counts == [g.numel() for g in gradients.values()]
    wrong = ranks.sum(torch.tensor(list(wrong.values()), dtype=F64)).sqrt().tolist()
    return max(w / float(g.double().norm()) for w, g in zip(wrong, gradients.values(), strict=True))


def train(sharding: Sharding, case: str, steps: range, limit: float = 1.0) -> list[float]:
    """Losses of steps of AdamW, clipped, of two micro-batches each; after each the clip norm."""
    found = []
    for step in steps:
        found.append(backward(sharding, case, step, 2))
        norm = sharding.squares().sqrt()
        found.append(float(norm))
        sharding.step(clip_factor(norm.float(), limit))
    return found


def apart(a: list[float], b: list[float]) -> float:
    """The worst relative difference."""
    return max(abs(x / y - 1) for x, y in zip(a, b, strict=True))


def same(ranks: Ranks, value: object) -> bool:
    """Whether all ranks have the same, which must be JSON."""
    return all(other == value for other in gather(ranks, value))


@torch.no_grad()
def weights(sharding: Sharding) -> dict[str, Tensor]:
    """The whole parameters as this rank computes with them; of stage 3, gathered."""
    named = sharding.model.named_parameters()
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p.detach()) for n, p in named}


@contextmanager
def told(*what: object) -> Iterator[None]:
    """Failures inside the `with` say of which case they are."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {what}")
        raise
