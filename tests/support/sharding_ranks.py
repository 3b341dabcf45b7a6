"""What runs inside the ranks of test_strategies.py: checks(ranks, folder), each alike on all ranks.

As a script: every check in turn, and a JSON object of what each complains about ("": nothing).
"""

import hashlib
import json
import sys
import time
import traceback
from itertools import product
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from minillm.distributed.ranks import Ranks, connect, leave
from minillm.distributed.strategies import Sharding
from minillm.runtime.launch import launched
from tests.support import sharding_keeping as keeping
from tests.support.sharding_toy import (
    BF16,
    CASES,
    EMPTY,
    EVEN,
    F32,
    F64,
    STAGES,
    TIMEOUT_S,
    apart,
    backward,
    made,
    same,
    sharded,
    told,
    train,
    truth,
    weights,
    worst_error,
)

LIMITS = {F64: 1e-12, F32: 2e-6}


def check_step(sharding: Sharding, case: str, dtype: torch.dtype, step: int, parts: int) -> None:
    """Loss, norm and gradients of a step are one process's; the norm is the same on all ranks."""
    loss, gradients = truth(case, dtype, step)
    found = backward(sharding, case, step, parts)
    squares = sharding.squares()
    assert squares.dtype == F64 and same(sharding.ranks, float(squares))
    norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    sharding.step(None)
    assert all(p.grad is None for p in sharding.model.parameters())
    error = worst_error(sharding, gradients)
    assert error <= LIMITS[dtype], f"gradients are off by {error:.2g}"
    assert apart([found, float(squares) ** 0.5], [loss, norm]) <= 1e-6


def gradients(ranks: Ranks, folder: Path) -> None:
    """At every stage, of every kind of model, in 1, 2 and 4 micro-batches; on 4 ranks in some."""
    few = ranks.size > 2
    for dtype, case, stage in product(LIMITS, CASES, STAGES):
        if few and dtype == F32 and case in ("plain", "tied"):
            continue
        sharding = sharded(made(case, dtype), ranks, stage, dtype, keep=True)
        for step, parts in enumerate((1, 4) if few else (1, 2, 4)):
            with told(dtype, case, stage, parts):
                # What a micro-batch weighs is rounded to fp32 unless it is a power of two.
                check_step(sharding, case, dtype, step + EVEN * (dtype == F64), parts)


def empty_rows(ranks: Ranks, folder: Path) -> None:
    """Rows without a target that counts, beside others or alone in a micro-batch of one rank."""
    for stage in STAGES:
        sharding = sharded(made("plain"), ranks, stage, keep=True)
        for step, parts in enumerate((1, 2, 4), EMPTY):
            with told(stage, parts):
                check_step(sharding, "plain", F32, step, parts)


def faults_are_seen(ranks: Ranks, folder: Path) -> None:
    """The same check fails where one rank weighs a little more, or a micro-batch is forgotten."""
    for stage in STAGES:
        heavy = sharded(made("plain"), ranks, stage, keep=True)
        heavy.weight *= 1.0 + 1e-4 * (ranks.rank == ranks.size - 1)
        forgetful = sharded(made("plain"), ranks, stage, keep=True)
        for sharding, parts in ((heavy, 1), (forgetful, 2)):
            backward(sharding, "plain", 0, parts)
            if sharding is forgetful:
                sharding.drop()
                backward(sharding, "plain", 1, parts)
            sharding.step(None)
            error = worst_error(sharding, truth("plain", F32, 0)[1])
            assert error > 10 * LIMITS[F32], (stage, error)
    moved = sharded(made("plain"), ranks, 0)
    with torch.no_grad():
        moved.model.norm.weight[0] += 1e-7 * (ranks.rank == 1)
    assert ranks.size == 1 or not same(ranks, digest(moved))


def infinite(ranks: Ranks, folder: Path) -> None:
    """Of one rank alone: all see it. Dropped, it is forgotten."""
    for stage in STAGES:
        with told(stage):
            sharding = sharded(made("plain"), ranks, stage, keep=True)
            for parts in (1, 2):
                own = float("inf") if ranks.rank == ranks.size - 1 else 1.0
                backward(sharding, "plain", 0, parts, scale=own)
                assert same(ranks, bool(sharding.squares().isfinite()))
                assert not sharding.squares().isfinite()
                sharding.drop()
                check_step(sharding, "plain", F32, 1, parts)


def digest(sharding: Sharding) -> str:
    """Of all bits of the weights that this rank computes with."""
    found = hashlib.sha256()
    for p in weights(sharding).values():
        found.update(p.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def identical(ranks: Ranks, folder: Path) -> None:
    """All ranks bit for bit after each step; losses and norms those of one process."""
    for case, dtype, limit in (("core", F32, 1e-5), ("tied", BF16, 2e-2)):
        alone = train(sharded(made(case, dtype), Ranks(), 0, dtype), case, range(3))
        for stage in STAGES:
            with told(dtype, case, stage):
                sharding = sharded(made(case, dtype), ranks, stage, dtype)
                found, digests = [], [digest(sharding)]
                for step in range(3):
                    found += train(sharding, case, range(step, step + 1))
                    digests.append(digest(sharding))
                assert same(ranks, digests) and len(set(digests)) == 4
                assert same(ranks, found) and apart(found, alone) <= limit, (found, alone)


def recomputed(ranks: Ranks, folder: Path) -> None:
    """Activation checkpointing changes nothing."""
    for case, stage in product(("plain", "core"), STAGES):
        with told(case, stage):
            model = made(case)
            model.checkpointing = True
            sharding = sharded(model, ranks, stage, keep=True)
            for step, parts in enumerate((1, 2)):
                check_step(sharding, case, F32, step, parts)


def compiled(ranks: Ranks, folder: Path) -> None:
    """Nor do compiled blocks, by which hooks must still be called."""
    for case, stage, backend, again in (
        ("tied", 2, "eager", False),
        ("tied", 3, "aot_eager", False),
        ("core", 2, "aot_eager", False),
        ("core", 3, "eager", True),
    ):
        with told(case, stage, backend):
            model = made(case)
            model.checkpointing = again
            model.compiled = [torch.compile(block, backend=backend) for block in model.blocks]
            sharding = sharded(model, ranks, stage, keep=True)
            counters.clear()
            for step in range(2):  # of the same shapes: others would be compiled anew
                check_step(sharding, case, F32, step, 2)
            assert counters["frames"]["ok"] > 0, counters["frames"]
            torch.compiler.reset()


CHECKS = {
    f.__name__: f
    for f in (
        gradients, empty_rows, faults_are_seen, infinite, identical, recomputed, compiled,
        keeping.tiling, keeping.memory, keeping.kept, keeping.frozen, keeping.judged,
        keeping.gathered_at_once,
    )
}  # fmt: skip


def run(ranks: Ranks, folder: Path) -> dict[str, str]:
    """What each check complains about."""
    said = {}
    for name, check in CHECKS.items():
        start = time.perf_counter()
        try:
            check(ranks, folder)
            said[name] = ""
        except Exception:
            said[name] = traceback.format_exc()
        print(f"{name} {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return said


def poison_empty() -> None:
    """As conftest.py does in the tests' own process: unwritten memory holds NaN."""
    empty = torch.empty

    @torch.no_grad()
    def poisoned(*args, **kwargs) -> torch.Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    torch.empty = poisoned


if __name__ == "__main__":
    torch.set_num_threads(1)
    poison_empty()
    CHECKS = {name: CHECKS[name] for name in sys.argv[2:] or CHECKS}
    ranks = connect(launched(), torch.device("cpu"), TIMEOUT_S)
    print(json.dumps(run(ranks, Path(sys.argv[1]))))
    ranks.close()
    leave(0)
