"""The checks of zero_ranks.py on what a rank keeps: pieces, their saving and loading, bytes."""

import json
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minillm.distributed.layout import UNEVEN
from minillm.distributed.ranks import Ranks
from minillm.distributed.zero import ZeroOptimizer
from tests.support.zero_toy import Toy, adamw, groups_of, make_pair, make_zero, named, train

TIMEOUT_S = 30  # how long the ranks wait for one another
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
CASES = {  # what is saved: parameters' dtype, storage, by owners, tolerance of later losses
    "fp64": (F64, None, False, 1e-11),
    "fp32": (F32, None, False, 1e-5),
    "bf16": (F32, BF16, False, 1e-2),
    "muon": (F64, None, True, 1e-8),
}


def tiling(ranks: Ranks, folder: Path) -> None:
    """The pieces of all ranks hold every element once, empty and 0-d parameters too."""
    for whole in (False, True):
        model = Toy()
        counts = {n: torch.zeros(p.numel()) for n, p in named(model).items()}
        owners = dict.fromkeys(counts, 0)
        for piece in make_zero(model, ranks, whole=whole).pieces():
            assert piece.master.shape == (piece.stop - piece.start,)
            values = named(model)[piece.name].detach().reshape(-1)[piece.start : piece.stop]
            assert torch.equal(piece.master, values) and piece.state == {}
            counts[piece.name][piece.start : piece.stop] += 1
            owners[piece.name] += 1
        for name, count in counts.items():
            assert bool((ranks.sum(count) == 1).all()), name
        owned = ranks.sum(torch.tensor(list(owners.values())))
        assert bool((owned == 1).all()) if whole else bool((owned >= 1).all())


class Wide(nn.Module):
    """Enough parameters that padding is little."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(nn.functional.linear(x, layer.weight, layer.bias))
        return x.float().square().mean()


def memory(ranks: Ranks, folder: Path) -> None:
    """Bytes by kind are those of the formula in zero.py, within 2 %; at most two are in flight."""
    w, limit = ranks.size, 0.08  # MiB: two of the matrices of fp32
    for stage, dtype, whole in [
        (1, F32, False),
        (1, BF16, False),
        (2, F32, False),
        (2, BF16, True),
    ]:
        model = Wide()
        names = list(named(model))
        zero = ZeroOptimizer(
            named(model), groups_of(names), adamw, ranks, stage=stage, dtype=dtype, whole=whole,
            bucket_mb=limit,
        )  # fmt: skip
        p = sum(x.numel() for x in model.parameters())
        flights, start = [], zero._reductions.start

        def counted(bucket, last, start=start, flights=flights, zero=zero):
            start(bucket, last)
            flights.append((len(zero._reductions), zero.bytes()["buffers"]))

        zero._reductions.start = counted
        for _ in range(2):
            for last in (False, True):
                with zero.synced(last):
                    model(torch.ones(2, 96, dtype=dtype)).backward()
            zero.squares()
            held = zero.bytes()
            zero.step()
        narrow = dtype == BF16
        expected = {
            "parameters": (2 if narrow else 4) * p,
            "gradients": 4 * p / w + (4 * p if stage == 1 else 0),
            "masters": 4 * p / w if narrow else 0,
            "buffers": 0,
        }
        # Whole matrices, 8 of them with 8 biases, fill some ranks' chunks better than others'.
        most = UNEVEN if whole else 1.02
        for kind, number in expected.items():
            assert 0.98 * number <= held[kind] <= most * number, (stage, dtype, kind, held)
        # Never any padding, but a count of four bytes with each piece.
        moments = ranks.sum(torch.tensor(held["moments"]))
        assert 8 * p <= moments <= 8 * p + 4 * (len(names) + w * len(zero.buckets))
        assert whole or held["moments"] <= 1.02 * 8 * p / w
        assert max(n for n, _ in flights) <= 2 and len(zero.buckets) >= (2 if whole else 4)
        if stage == 2:  # two on their way, one filling in each group, and two results
            assert max(n for _, n in flights) <= (2 + 2 + 2 / w) * limit * 2**20 * most


def offloading(ranks: Ranks, folder: Path) -> None:
    """Offloaded or not, the same to the bit."""
    for stage in (1, 2):
        for dtype in (F32, BF16):
            models = [Toy(), Toy()]
            losses = [
                train(m, [make_zero(m, ranks, stage=stage, dtype=dtype, offload=off)], ranks,
                      range(4), 2)
                for off, m in zip((False, True), models, strict=True)
            ]  # fmt: skip
            assert losses[0] == losses[1]
            for a, b in zip(*(m.parameters() for m in models), strict=True):
                assert torch.equal(a, b)
    assert make_zero(Toy(), ranks, offload=True).bytes()["masters"] > 0


def patience(ranks: Ranks, folder: Path) -> None:
    """An optimiser waits for a rank that has stopped as long as the launch does, no longer."""
    if ranks.size > 1:
        group = make_zero(Toy(), ranks)._comm._get_backend(ranks.device)
        assert group.options._timeout == timedelta(seconds=TIMEOUT_S)


def made(case: str, ranks: Ranks, stage: int) -> tuple[Toy, list[ZeroOptimizer]]:
    """A fresh model of a case and its optimisers."""
    dtype, storage, owners, _ = CASES[case]
    model = Toy(dtype)
    if owners:
        return model, make_pair(model, ranks, stage=stage)
    return model, [make_zero(model, ranks, stage=stage, dtype=storage)]


def tensors(zeros: list[ZeroOptimizer]) -> dict[str, Tensor]:
    """Everything that is kept, under KIND|NAME|START|STOP."""
    found = {}
    for piece in (piece for zero in zeros for piece in zero.pieces()):
        for kind, x in {"model": piece.master, **piece.state}.items():
            found[f"{kind}|{piece.name}|{piece.start}|{piece.stop}"] = x.clone()
    return found


def saved(ranks: Ranks, folder: Path) -> None:
    """Two ranks leave their pieces and the losses that come after for others to compare."""
    if ranks.size != 2:
        return
    for case in CASES:
        model, zeros = made(case, ranks, stage=2)
        train(model, zeros, ranks, range(3))
        save_file(tensors(zeros), folder / f"{case}-{ranks.rank}.safetensors")
        losses = train(model, zeros, ranks, range(3, 6))
        if ranks.rank == 0:
            (folder / f"{case}.json").write_text(json.dumps(losses))
    ranks.wait()


class Whole:
    """What all ranks saved, put together: the reader that load() wants."""

    def __init__(self, folder: Path, case: str) -> None:
        self.shapes = {n: p.numel() for n, p in Toy().named_parameters()}
        self.tensors: dict[tuple[str, str], Tensor] = {}
        for path in sorted(folder.glob(f"{case}-*.safetensors")):
            for key, x in load_file(path).items():
                kind, name, start, stop = key.split("|")
                if x.dim() == 0:
                    self.tensors[kind, name] = x.view(1)
                    continue
                full = torch.full((self.shapes[name],), torch.nan, dtype=x.dtype)
                full = self.tensors.setdefault((kind, name), full)
                full[int(start) : int(stop)] = x

    def __call__(self, kind: str, name: str, start: int, stop: int) -> Tensor | None:
        there = self.tensors.get((kind, name))
        return None if there is None else there[start:stop]


def restored(ranks: Ranks, folder: Path) -> None:
    """What two ranks saved is the same on any number, at either stage, and goes on the same way."""
    for case, (_, storage, _, tolerance) in CASES.items():
        read = Whole(folder, case)
        expected = json.loads((folder / f"{case}.json").read_text())
        for stage in (1, 2):
            model, zeros = made(case, ranks, stage)
            for zero in zeros:
                zero.load(read)
            kept = tensors(zeros)
            for key, x in kept.items():
                kind, name, start, stop = key.split("|")
                here = read(kind, name, *((int(start), int(stop)) if x.dim() else (0, 1)))
                assert torch.equal(x.reshape(-1), here) and not x.isnan().any(), key
            for name, p in named(model).items():
                there = read("model", name, 0, p.numel()).to(storage or p.dtype)
                assert torch.equal(p.detach().reshape(-1), there), name
            losses = train(model, zeros, ranks, range(3, 6))
            worst = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
            assert worst <= (0 if ranks.size == 2 and stage == 2 else tolerance), (case, worst)
        # Nothing known: as made, and no step counted.
        fresh = made(case, ranks, 1)[1]
        before = [piece.master.clone() for zero in fresh for piece in zero.pieces()]
        for zero in fresh:
            zero.load(lambda *where: None)
        after = [piece for zero in fresh for piece in zero.pieces()]
        assert all(torch.equal(a, b.master) for a, b in zip(before, after, strict=True))
        assert all(not x.any() for piece in after for x in piece.state.values())
    model, zeros = made("fp64", ranks, 1)
    losses = train(model, zeros, ranks, range(3, 6))
    assert max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)) > 1e-3  # it matters
