"""What runs inside the ranks of test_zero.py: checks(ranks, folder), each alike on all ranks.

As a script: every check in turn, and a JSON object of what each complains about ("": nothing).
"""

import json
import sys
import traceback
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from minillm.distributed.ranks import Ranks, connect, leave
from minillm.distributed.reductions import Reductions
from minillm.distributed.zero import ZeroOptimizer
from minillm.runtime.launch import launched
from tests.support import zero_keeping as keeping
from tests.support.zero_toy import (
    Record,
    Toy,
    adamw,
    backward,
    groups_of,
    make_pair,
    make_zero,
    micro_batches,
    muon,
    named,
    pair_groups,
    plain,
    train,
)

ALONE = Ranks()
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def alone_gradients(model: Toy, step: int) -> dict[str, torch.Tensor | None]:
    """Of the whole step in one process, by plain autograd; None where there are none."""
    for p in model.parameters():
        p.grad = None
    model(*next(micro_batches(step, ALONE, 1))).backward()
    return {n: p.grad for n, p in named(model).items()}


def worst_error(zeros: list[ZeroOptimizer], truth: dict, ranks: Ranks) -> float:
    """Of the recorded gradients, relative L2 of the worst tensor; only where one is to be."""
    truth, wrong = {n: g for n, g in truth.items() if g is not None}, dict.fromkeys(truth, 0.0)
    for piece in (piece for zero in zeros for piece in zero.pieces()):
        assert (piece.name in truth) == ("gradient" in piece.state), piece.name
        if piece.name not in truth:
            continue
        seen = piece.state["gradient"].double()
        expected = truth[piece.name].reshape(-1)[piece.start : piece.stop].double()
        wrong[piece.name] += float((seen - expected).square().sum())
    wrong = {name: wrong[name] for name in truth}
    wrong = ranks.sum(torch.tensor(list(wrong.values()), dtype=F64)).sqrt().tolist()
    norms = [float(g.double().norm()) for g in truth.values()]
    return max(w / (n or 1.0) for w, n in zip(wrong, norms, strict=True))


def recorded(ranks: Ranks, dtype: torch.dtype, accumulate: int, split: bool, **options) -> float:
    """The error of two steps' gradients; split: over two optimisers."""
    model, twin = Toy(dtype), Toy(dtype)
    names = list(named(model))
    shares = [names[::2], names[1::2]] if split else [names]
    zeros = [
        make_zero(model, ranks, Record, share, group=ranks.optimizer_group(i), **options)
        for i, share in enumerate(shares)
    ]
    # Whole matrices of all sizes are only even in buckets of many; of bf16, twice as many fit.
    few = options.get("whole") or options.get("reduce_dtype") == BF16
    assert sum(len(zero.buckets) for zero in zeros) >= (2 if few else 4)
    errors = []
    for step in (0, 1):
        backward(model, zeros, step, ranks, accumulate)
        assert all(p.grad is None for p in model.parameters())
        for zero in zeros:
            zero.step()
        errors.append(worst_error(zeros, alone_gradients(twin, step), ranks))
    return max(errors)


def gradients(ranks: Ranks, folder: Path) -> None:
    """Equal to one process's: any stage, layout, accumulation; a parameter crosses a border."""
    for stage in (1, 2):
        for accumulate in (1, 2, 4):
            for whole in (False, True):
                error = recorded(ranks, F64, accumulate, False, stage=stage, whole=whole)
                assert error < 1e-12, (stage, accumulate, whole, error)
            error = recorded(ranks, F32, accumulate, accumulate == 2, stage=stage)
            assert error < 2e-6, (stage, accumulate, error)
    for dtype, reduce_dtype, limit in ((F16, F32, 4e-3), (BF16, F32, 3e-2), (BF16, BF16, 3e-2)):
        error = recorded(ranks, dtype, 2, False, stage=2, reduce_dtype=reduce_dtype)
        assert error < limit, (dtype, reduce_dtype, error)
    if ranks.size > 1:
        model = Toy()
        sizes = {n: p.numel() for n, p in named(model).items()}
        cut = [0 < p.stop - p.start < sizes[p.name] for p in make_zero(model, ranks).pieces()]
        assert any(cut)


def faults_are_seen(ranks: Ranks, folder: Path) -> None:
    """The comparison of gradients fails where a micro-batch's reduction is lost."""
    complete = Reductions._complete_oldest

    def lose(self):
        self._queue[0].bucket.shard = None
        complete(self)

    with patch.object(Reductions, "_complete_oldest", lose):
        assert recorded(ranks, F64, 2, False, stage=2) > 1e-3


def same_everywhere(model: nn.Module, ranks: Ranks) -> bool:
    """Whether the ranks' parameters agree to the bit."""
    flat = torch.cat([p.detach().reshape(-1).double() for p in model.parameters()])
    together = ranks.sum(flat.clone())  # sums of two or four equal numbers are exact
    return ranks.minimum(float(torch.equal(together, flat * ranks.size))) == 1


def training(ranks: Ranks, folder: Path) -> None:
    """Twenty steps follow those of one process; ranks are identical after each."""
    for dtype, limit in [(F64, 1e-9), (F32, 1e-5), (BF16, 1e-2)]:
        twin = Toy(F64 if dtype == F64 else F32)
        expected = train(twin, [make_zero(twin, ALONE, dtype=dtype)], ALONE, range(20))
        for stage in (1, 2):
            model = Toy(F64 if dtype == F64 else F32)
            zeros = [make_zero(model, ranks, stage=stage, dtype=dtype)]
            losses = []
            for step in range(20):
                losses += train(model, zeros, ranks, range(step, step + 1), 1 + step % 2)
                assert dtype == F64 or same_everywhere(model, ranks), (dtype, stage, step)
            worst = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
            assert worst < limit, (dtype, stage, worst)
    if ranks.size > 1:
        with torch.no_grad():
            model.wide[0, ranks.rank] += 1
        assert not same_everywhere(model, ranks)


def plain_optimizers(ranks: Ranks, folder: Path) -> None:
    """Our AdamW and torch's, with grad_scale, move what they move in one process without us."""
    scale = torch.tensor(0.37)
    torchs = partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95))
    for make in (adamw, torchs, partial(torch.optim.SGD, lr=0.1, momentum=0.9)):
        twin, model = Toy(F64), Toy(F64)
        alone = plain(groups_of(list(named(twin))), make, twin)
        zero = make_zero(model, ranks, make, stage=2)
        for step in range(3):
            truth = alone_gradients(twin, step)
            for name, p in named(twin).items():
                p.grad = None if truth[name] is None else truth[name] * scale
            alone.step()
            backward(model, [zero], step, ranks)
            zero.step(scale)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def muon_by_owners(ranks: Ranks, folder: Path) -> None:
    """Muon over ranks moves what plain Muon does in one process; owners hold whole matrices."""
    twin, scale = Toy(F64), torch.tensor(0.37)
    alone = [plain(g, f, twin) for g, f in zip(pair_groups(twin), (muon, adamw), strict=True)]
    for step in range(4):
        for name, g in alone_gradients(twin, step).items():
            named(twin)[name].grad = g
        for optimizer in alone:
            optimizer.step(grad_scale=scale)
    for stage, accumulate in ((1, 1), (2, 4)):
        model = Toy(F64)
        pair = make_pair(model, ranks, stage=stage)
        for step in range(4):
            backward(model, pair, step, ranks, accumulate)
            for zero in pair:
                zero.step(scale)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
        shapes = {n: p.shape for n, p in named(model).items()}
        for group in pair[0].param_groups:
            for matrix, parts in zip(group["params"], group["parts"], strict=True):
                assert matrix.dim() == 2 and sum(parts) == matrix.shape[0]
        for piece in pair[0].pieces():
            assert (piece.start, piece.stop) == (0, shapes[piece.name].numel())


def checkpointing(ranks: Ranks, folder: Path) -> None:
    """Recomputing the loop's body changes no gradient; re-entrantly it is refused by name."""
    for stage in (1, 2):
        model = Toy(F64, recompute=False)
        zero = make_zero(model, ranks, Record, stage=stage)
        backward(model, [zero], 0, ranks)
        zero.step()
        assert worst_error([zero], alone_gradients(Toy(F64), 0), ranks) < 1e-12
        model.recompute = True
        try:
            backward(model, [zero], 1, ranks)
        except RuntimeError as e:
            assert str(e).startswith("loop got two gradients in one backward pass"), e
        else:
            raise AssertionError("no error")
        model.recompute = False
        refused(zero.step, "step() before")
        zero.zero_grad()
        backward(model, [zero], 0, ranks)
        zero.step()
        assert worst_error([zero], alone_gradients(Toy(F64), 0), ranks) < 1e-12


def refused(action, message: str) -> None:
    """That it raises RuntimeError, saying so."""
    try:
        action()
    except RuntimeError as e:
        assert message in str(e), e
    else:
        raise AssertionError(f"no {message!r}")


def skipping(ranks: Ranks, folder: Path) -> None:
    """An Inf on one rank is seen by all; a skipped step and a bare forward leave no trace."""
    for stage in (1, 2):
        models = [Toy(), Toy()]
        disturbed, calm = (make_zero(model, ranks, stage=stage, dtype=BF16) for model in models)
        for step in range(3):
            for model, zero in zip(models, (disturbed, calm), strict=True):
                train(model, [zero], ranks, range(step, step + 1), 2)
            with torch.no_grad():
                models[0](*next(micro_batches(step, ranks, 1)))
            with disturbed.synced(True):
                loss = models[0](*next(micro_batches(9, ranks, 1)))
                (loss * (torch.inf if ranks.rank == ranks.size - 1 else 1)).backward()
            assert not ranks.sum(disturbed.squares()).isfinite()
            disturbed.zero_grad()
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(a, b)


def norm(ranks: Ranks, folder: Path) -> None:
    """The sum of squares over ranks is the gradient's, every element once."""
    for dtype, limit in ((F64, 1e-13), (F32, 1e-6)):
        found = alone_gradients(Toy(F64), 3).values()
        truth = [g.double().square().sum() for g in found if g is not None]
        for stage in (1, 2):
            model = Toy(dtype)
            zero = make_zero(model, ranks, stage=stage)
            assert zero.squares() == 0
            backward(model, [zero], 3, ranks, 2)
            found = ranks.sum(zero.squares()).sqrt()
            assert found.dtype == F64 and abs(found / sum(truth).sqrt() - 1) < limit


def untouched(ranks: Ranks, folder: Path) -> None:
    """What gets no gradient on any rank, or is frozen, stays: no decay, no state; the rest moves as
    in one process. A parameter with a gradient on one rank alone is moved on all.
    """
    still = ("wide", "bias")
    for frozen, stage, pair in product(((), still), (1, 2), (False, True)):
        twin, model = Toy(F64), Toy(F64)
        start = {n: p.detach().clone() for n, p in named(model).items()}
        for name in frozen:
            named(twin)[name].requires_grad_(False)
            named(model)[name].requires_grad_(False)
        if pair:
            zeros = make_pair(model, ranks, stage=stage)
            alone = [
                plain(g, f, twin) for g, f in zip(pair_groups(twin), (muon, adamw), strict=True)
            ]
        else:
            zeros = [make_zero(model, ranks, stage=stage)]
            alone = [plain(groups_of(list(named(twin))), adamw, twin)]
        for step in range(3):
            found = alone_gradients(twin, step)
            for optimizer in alone:
                optimizer.step()
            backward(model, zeros, step, ranks, 1 + step % 2)
            squares = float(ranks.sum(sum(zero.squares() for zero in zeros)))
            truth = sum(float(g.square().sum()) for g in found.values() if g is not None)
            assert abs(squares / truth - 1) < 1e-9
            told = {name for zero in zeros for name, _ in zero.gradients()}
            assert not told & {"never", *frozen}
            for zero in zeros:
                zero.step()
        for name, p in named(model).items():
            torch.testing.assert_close(p, named(twin)[name], rtol=1e-7, atol=1e-10)
            assert torch.equal(p, start[name]) == (name in ("never", "empty", *frozen)), name
        pieces = [piece for zero in zeros for piece in zero.pieces()]
        assert {p.name for p in pieces if not p.state} <= {"never", *frozen}
        assert all(not p.state for p in pieces if p.name in ("never", *frozen))
        counts = {n: torch.zeros(p.numel()) for n, p in named(model).items()}
        for piece in pieces:
            counts[piece.name][piece.start : piece.stop] += 1
        assert all(bool((ranks.sum(count) == 1).all()) for count in counts.values())


def few_elements(ranks: Ranks, folder: Path) -> None:
    """Fewer elements than ranks: some have nothing, and it works."""
    for stage in (1, 2):
        model = nn.Module()
        model.w = nn.Parameter(torch.tensor([3.0, -1.0], dtype=F64))
        groups = [{"params": ["w"], "weight_decay": 0.0}, {"params": []}]
        make = partial(torch.optim.SGD, lr=0.25)
        zero = ZeroOptimizer(named(model), groups, make, ranks, stage=stage)
        for _ in range(2):
            with zero.synced(True):
                (model.w.square().sum() / ranks.size).backward()
            zero.step()
        assert torch.equal(model.w.detach(), torch.tensor([0.75, -0.25], dtype=F64))
        assert len(list(zero.pieces())) == (ranks.rank == 0)


CHECKS = {
    f.__name__: f
    for f in (
        gradients, faults_are_seen, training, plain_optimizers, muon_by_owners, checkpointing,
        skipping, norm, untouched, few_elements, keeping.tiling, keeping.memory, keeping.offloading,
        keeping.patience, keeping.saved, keeping.restored,
    )
}  # fmt: skip


def run(ranks: Ranks, folder: Path) -> dict[str, str]:
    """What each check complains about."""
    said = {}
    for name, check in CHECKS.items():
        try:
            check(ranks, folder)
            said[name] = ""
        except Exception:
            said[name] = traceback.format_exc()
    return said


def poison_empty() -> None:
    """As conftest.py does in the tests' own process: unwritten memory holds NaN."""
    empty = torch.empty
    torch.empty = lambda *a, **k: torch.no_grad()(torch.Tensor.fill_)(empty(*a, **k), torch.nan)


if __name__ == "__main__":
    torch.set_num_threads(1)
    poison_empty()
    ranks = connect(launched(), torch.device("cpu"), keeping.TIMEOUT_S)
    print(json.dumps(run(ranks, Path(sys.argv[1]))))
    ranks.close()
    leave(0)
