"""Checks of sharding_ranks.py about what ranks keep: pieces, bytes, checkpoints; and about what is
done with a sharded model between steps.
"""

import json
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from minillm.checkpoint.find import open_checkpoint
from minillm.checkpoint.read import Checkpoint
from minillm.checkpoint.write import save, sharded_tensors
from minillm.config.train import ModelConfig
from minillm.distributed.agreement import gather
from minillm.distributed.ranks import Ranks
from minillm.distributed.strategies import Sharding
from minillm.model.gpt import GPT
from minillm.ops import EAGER
from minillm.optim.build import state_kinds
from minillm.planning.estimate import Job, memory as planned
from minillm.training import recurrence_metrics
from minillm.training.evaluate import evaluate
from tests.support.generating import generated
from tests.support.sharding_toy import (
    BF16,
    F32,
    STAGES,
    apart,
    backward,
    batch,
    made,
    same,
    sharded,
    told,
    train,
    truth,
    weights,
    worst_error,
)

KINDS = {"step", "exp_avg", "exp_avg_sq"}
SAVED = (("learned", F32), ("core", BF16))
TOLERANCE = {F32: 1e-6, BF16: 1e-2}


def tiling(ranks: Ranks, folder: Path) -> None:
    """Pieces of all ranks cover every parameter once, before the first step and after."""
    for case, stage in product(("learned", "core"), STAGES):
        with told(case, stage):
            model = made(case)
            sizes = {name: p.numel() for name, p in model.named_parameters()}
            sharding = sharded(model, ranks, stage)
            for step in range(2):
                mine = [[p.name, p.start, p.stop] for p in sharding.pieces()]
                for piece in sharding.pieces():
                    flat = [x for x in piece.state.values() if x.dim()]
                    assert all(
                        x.shape == (piece.stop - piece.start,) for x in (piece.master, *flat)
                    )
                    assert set(piece.state) == (KINDS if step else set())
                spans = sorted(span for each in gather(ranks, mine) for span in each)
                found = dict.fromkeys(sizes, 0)
                for name, start, stop in spans:
                    if start < stop:
                        assert start == found[name], (name, start, found[name])
                        found[name] = stop
                assert found == sizes
                train(sharding, case, range(step, step + 1))


def memory(ranks: Ranks, folder: Path) -> None:
    """Bytes as planned, within 2 %, when a step's gradients are there."""
    shape = ModelConfig(vocab_size=64, seq_len=8, d_model=64, n_head=1, n_layer=3)
    kinds = ("parameters", "gradients", "masters", "moments")
    for (dtype, width), stage in product(((F32, 4), (BF16, 2)), STAGES):
        with told(dtype, stage):
            model = GPT(shape, EAGER, dtype, torch.Generator().manual_seed(0))
            sharding = sharded(model, ranks, stage, dtype)
            tokens = torch.arange(8)[None]
            for step in range(2):
                with sharding.synced(True):
                    sharding.forward(tokens, tokens).backward()
                sharding.squares()
                if not step:
                    sharding.step(None)
            plan, found = planned(Job(shape, ranks.size, width=width), stage), sharding.bytes()
            for kind in kinds:
                assert abs(found[kind] - plan[kind]) <= 0.02 * plan[kind], (kind, found, plan)


def write(run: Path, sharding: Sharding, step: int) -> None:
    """A checkpoint, as training.save makes it."""
    shapes = {name: tuple(p.shape) for name, p in sharding.model.named_parameters()}
    tensors = sharded_tensors(sharding.pieces(), shapes)
    if sharding.ranks.rank == 0:
        run.mkdir(parents=True)
        (run / "config.json").touch()
    sharding.ranks.wait()
    state = {"shapes": {name: list(shape) for name, shape in shapes.items()}}
    save(run, step, tensors, state, sharding.ranks)


def check_against(past: Checkpoint, sharding: Sharding, dtype: torch.dtype) -> None:
    """Weights, masters and states are the checkpoint's, element for element."""
    whole, optimizer = past.tensors("model"), past.tensors("optimizer")
    assert optimizer.keys() == {f"{kind}.{name}" for kind in KINDS for name in whole}
    for name, p in weights(sharding).items():
        assert torch.equal(p, whole[name].to(p.dtype)), name
        assert p.dtype in (F32, dtype) and p.shape == whole[name].shape
    for piece in sharding.pieces():
        at = slice(piece.start, piece.stop)
        assert torch.equal(piece.master, whole[piece.name].reshape(-1)[at]), piece.name
        assert set(piece.state) == KINDS
        for kind, x in piece.state.items():
            there: Tensor = optimizer[f"{kind}.{piece.name}"]
            assert torch.equal(x, there.reshape(-1)[at] if x.dim() else there), (kind, piece.name)
        assert piece.state["step"] == past.step == 2


def kept(ranks: Ranks, folder: Path) -> None:
    """Saved at stages 3, 2 and 0, loaded at any; and by other numbers of ranks."""
    for (case, dtype), stage in product(SAVED, (3, 2, 0) if ranks.size > 1 else ()):
        with told("saved", case, stage):
            run = folder / f"{case}-{ranks.size}-{stage}"
            sharding = sharded(made(case, dtype), ranks, stage, dtype)
            train(sharding, case, range(2))
            write(run, sharding, 2)
            check_against(open_checkpoint(run, ranks=ranks), sharding, dtype)
            losses = train(sharding, case, range(2, 3))
            if ranks.rank == 0:
                (run / "losses.json").write_text(json.dumps(losses))
            ranks.wait()
    for (case, dtype), size, stage in product(SAVED, (2, 4), (3, 2, 0)):
        run = folder / f"{case}-{size}-{stage}"
        if not run.exists():
            continue
        expected = json.loads((run / "losses.json").read_text())
        # All stages what stage 3 has saved, stage 3 what others have; of other ranks' some.
        stages = STAGES if stage == 3 else (3,)
        if size != ranks.size:
            stages = (3, 1) if stage == 3 or ranks.size == 1 else ()
        for other in stages:
            with told("loaded", case, size, stage, other):
                past = open_checkpoint(run, ranks=ranks)
                sharding = sharded(made(case, dtype), ranks, other, dtype)
                with torch.no_grad():
                    for p in sharding.model.parameters():
                        p.mul_(1.5)
                sharding.load(past)
                check_against(past, sharding, dtype)
                losses = train(sharding, case, range(2, 3))
                assert apart(losses, expected) <= TOLERANCE[dtype], (losses, expected)


def frozen(ranks: Ranks, folder: Path) -> None:
    """Frozen weights stay as they are and have no state, at every stage, also of a checkpoint."""
    kept, alone = ("embed.weight", "blocks.1.", "norm.weight"), {}
    for stage, dtype in product(STAGES, (F32, BF16)):
        with told(stage, dtype):
            model = made("core", dtype)
            start = {n: p.detach().clone() for n, p in model.named_parameters()}
            still = {n for n in start if n.startswith(kept)}
            for name, p in model.named_parameters():
                p.requires_grad_(name not in still)
            sharding = sharded(model, ranks, stage, dtype)
            losses = train(sharding, "core", range(2))
            alone.setdefault(dtype, losses)
            assert apart(losses, alone[dtype]) <= TOLERANCE[dtype], (losses, alone[dtype])
            for name, p in weights(sharding).items():
                assert torch.equal(p, start[name]) == (name in still), name
            for piece in sharding.pieces():
                assert set(piece.state) == (set() if piece.name in still else KINDS)
            run = folder / f"frozen-{ranks.size}-{stage}-{dtype}"
            write(run, sharding, 2)
            past = open_checkpoint(run, ranks=ranks)
            past.check_optimizer(state_kinds("adamw", start.keys() - still, ()))
            losses = train(sharding, "core", range(2, 3))
            for other in STAGES if stage == 2 else (stage,):
                model = made("core", dtype)
                for name, p in model.named_parameters():
                    p.requires_grad_(name not in still)
                again = sharded(model, ranks, other, dtype)
                with torch.no_grad():
                    for p in again.model.parameters():
                        p.mul_(1.5)
                again.load(past)
                assert apart(train(again, "core", range(2, 3)), losses) <= TOLERANCE[dtype]
                for name, p in weights(again).items():
                    assert name not in still or torch.equal(p, start[name]), name


def windows(count: int) -> list[tuple[Tensor, Tensor]]:
    """Windows of the case "core" to be judged on."""
    tokens, targets, _ = batch("core", 50)
    return list(zip(tokens, targets, strict=True))[:count]


def judge(model: GPT, ranks: Ranks, count: int) -> list[float]:
    """The loss on so many windows, and how many tokens were counted."""
    found = evaluate(model, windows(count), 2, ranks)
    return [found.loss, float(found.tokens)]


def climb(model: GPT, ranks: Ranks) -> list[float]:
    """What the ladder says, of three windows."""
    found = recurrence_metrics.measure(model, windows(3), 2, ranks)
    return [*found["val_loss_at_r"].values(), found["state_growth"], found["token_correlation"]]


def written(model: GPT) -> list[int]:
    """Some text, of the likeliest tokens."""
    model.eval()
    made = generated(model, [[1, 2, 3], [4]], max_tokens=8, temperature=0.0)
    ids = [token.id for token in made]
    model.train()
    return ids


def judged(ranks: Ranks, folder: Path) -> None:
    """Between steps: evaluation, of fewer windows than ranks too, the ladder, a sample."""
    twin = made("core")
    alone = [judge(twin, Ranks(), n) for n in (1, 3, 7)], climb(twin, Ranks()), written(twin)
    for stage in STAGES:
        with told(stage):
            sharding = sharded(made("core"), ranks, stage, keep=True)
            for step in range(2):
                backward(sharding, "core", step, 2)
                sharding.step(None)
                assert worst_error(sharding, truth("core", F32, step)[1]) <= 2e-6
                for n, expected in zip((1, 3, 7), alone[0], strict=True):
                    found = judge(sharding.model, ranks, n)
                    assert same(ranks, found) and apart(found, expected) <= 1e-6
                with sharding.gathered():
                    found = climb(sharding.model, ranks)
                assert same(ranks, found) and apart(found[:-1], alone[1][:-1]) <= 1e-5
                with sharding.gathered():
                    assert written(sharding.model) == alone[2]


def gathered_at_once(ranks: Ranks, folder: Path) -> None:
    """The same before anything else was done with the model; then a step."""
    expected = written(made("core"))
    for stage in STAGES:
        with told(stage):
            sharding = sharded(made("core"), ranks, stage, keep=True)
            with sharding.gathered():
                assert written(sharding.model) == expected
            backward(sharding, "core", 0, 2)
            sharding.step(None)
            assert worst_error(sharding, truth("core", F32, 0)[1]) <= 2e-6
