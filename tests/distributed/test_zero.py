"""ZeRO stages 1 and 2: the checks of zero_ranks.py on 1, 2 and 4 ranks; layouts; refusals."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from minillm.distributed.layout import ALIGN, UNEVEN, by_owner, cut, in_a_row
from minillm.distributed.ranks import Ranks
from minillm.distributed.zero import ZeroOptimizer
from tests.support.processes import complaints, launch
from tests.support.zero_ranks import CHECKS
from tests.support.zero_toy import Record, Toy, backward, make_zero, named, train

ALONE = Ranks()
SCRIPT = "tests/support/zero_ranks.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks of one launch leave for those of the next."""
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def said(folder: Path) -> Callable[[int], list[dict[str, str]]]:
    return complaints(SCRIPT, folder)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_on_ranks(said, size, name):
    complaints = [one[name] for one in said(size)]
    assert complaints == [""] * size, "\n".join(complaints)


@pytest.mark.parametrize("name", CHECKS)
def test_alone(said, folder, name):
    said(2)
    CHECKS[name](ALONE, folder)


def test_a_failing_rank_ends_the_launch(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1':\n    sys.exit('rank one has had enough')\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(AssertionError, match=r"(?s)ranks \[1\] failed.*rank one has had enough"):
        launch(2, script, seconds=30)
    script.write_text("import time\ntime.sleep(60)\n")
    with pytest.raises(AssertionError, match=r"ranks \[0\] were not done after 0.5 s"):
        launch(1, script, seconds=0.5)


SIZES = st.lists(st.integers(0, 1000), min_size=1, max_size=12)


@given(SIZES, st.integers(1, 5), st.integers(64, 3000), st.booleans())
def test_layouts(numbers, ranks, limit, whole):
    """Every parameter once, apart, aligned, inside; uncut if whole; buckets as long as allowed."""
    sizes = {str(i): n for i, n in enumerate(numbers)}
    layouts = list(cut(sizes, ranks, limit, whole))
    assert [n for layout in layouts for n in layout.offsets] == list(sizes)
    for last, layout in zip([False] * (len(layouts) - 1) + [True], layouts, strict=True):
        assert layout.chunk % ALIGN == 0
        end = 0
        for offset, name in sorted((o, n) for n, o in layout.offsets.items()):
            assert offset >= end and offset % ALIGN == 0
            end = offset + max(1, sizes[name])
            if whole:
                assert offset // layout.chunk == (end - 1) // layout.chunk
        assert end <= layout.chunk * ranks
        total = sum(max(1, -(-sizes[n] // ALIGN)) * ALIGN for n in layout.offsets)
        if not whole:
            assert len(layout.offsets) == 1 or total <= limit + ALIGN
            assert layout.chunk * ranks < total + ranks * ALIGN
        elif not last:
            assert layout.chunk * ranks <= UNEVEN * total


def test_matrices_of_one_size_are_dealt_out():
    assert by_owner({"a": 64, "b": 64, "c": 64, "d": 64}, 2).chunk == 128
    assert by_owner({"a": 100, "b": 64}, 4).chunk == 128
    assert in_a_row({"a": 65, "b": 0, "c": 1}, 2).offsets == {"a": 0, "b": 128, "c": 192}


def test_parameters_are_views_of_buckets_and_wide_masters_the_same_memory():
    model = Toy()
    before = {n: p.detach().clone() for n, p in named(model).items()}
    zero = make_zero(model, ALONE)
    for bucket in zero.buckets:
        assert bucket.master is bucket.own
        for name, p in bucket.parameters.items():
            assert torch.equal(p, before[name])
            assert p.untyped_storage().data_ptr() == bucket.flat.untyped_storage().data_ptr()


def test_masters_are_of_the_values_before_narrowing():
    model, twin = Toy(), Toy()
    zero = make_zero(model, ALONE, dtype=torch.bfloat16)
    for piece in zero.pieces():
        wide = named(twin)[piece.name].detach().reshape(-1)
        assert piece.master.dtype == torch.float32 and torch.equal(piece.master, wide)
        assert torch.equal(named(model)[piece.name].reshape(-1), wide.bfloat16())


@pytest.mark.parametrize("reduce, stored, wire", [
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
])  # fmt: skip
def test_gradients_are_summed_in_the_wider_dtype(reduce, stored, wire):
    model = Toy()
    zero = make_zero(model, ALONE, Record, dtype=stored, reduce_dtype=reduce)
    assert {bucket.full.dtype for bucket in zero.buckets} == {wire}
    backward(model, [zero], 0, ALONE)
    zero.step()
    wide = torch.float64 if stored == torch.float64 else torch.float32
    gradients = [piece.state.get("gradient") for piece in zero.pieces()]
    assert {gradient.dtype for gradient in gradients if gradient is not None} == {wide}


def test_the_norm_of_a_large_tensor_is_right():
    """3.1M elements of fp32, where one pass in fp32 may be off by 6e-5."""
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(3_100_000))
    zero = ZeroOptimizer(
        named(model), [{"params": ["w"]}], partial(torch.optim.SGD, lr=0.1), ALONE, stage=2
    )
    g = torch.rand(len(model.w), generator=torch.Generator().manual_seed(2))
    with zero.synced(True):
        (model.w * g).sum().backward()
    assert abs(zero.squares() / g.double().square().sum() - 1) < 1e-7


def test_refusals():
    model = Toy()
    parameters, make = named(model), partial(torch.optim.SGD, lr=0.1)
    groups = [{"params": list(parameters)}]
    with pytest.raises(ValueError, match="stage is 3; expected 1 or 2"):
        ZeroOptimizer(parameters, groups, make, ALONE, stage=3)
    for wrong in ([{"params": ["bias"]}], [*groups, {"params": ["bias"]}], [{"params": ["x"]}]):
        with pytest.raises(ValueError, match="name every parameter once"):
            ZeroOptimizer(parameters, wrong, make, ALONE)
    with pytest.raises(ValueError, match="name every parameter once"):
        twice = {**parameters, "again": model.bias}
        ZeroOptimizer(twice, [{"params": list(twice)}], make, ALONE)
    zero = make_zero(model, ALONE)
    with pytest.raises(RuntimeError, match="has come outside of synced"):
        model.bias.sum().backward()
    zero.zero_grad()
    with zero.synced(False):
        model.bias.sum().backward()
    with pytest.raises(RuntimeError, match="before a backward pass in synced"):
        zero.step()


def test_the_rate_is_set_as_in_any_optimizer():
    model = Toy()
    zero = make_zero(model, ALONE)
    before = {n: p.detach().clone() for n, p in named(model).items()}
    for group in zero.param_groups:
        group["lr"] = 0.0 * group["rate"]
    train(model, [zero], ALONE, range(1))
    assert all(torch.equal(p, before[n]) for n, p in named(model).items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_offloading_from_a_gpu_changes_nothing(dtype, limit):
    device = torch.device("cuda")
    adamw = partial(torch.optim.AdamW, lr=3e-3)
    rows = torch.randint(40, (16, 7), generator=torch.Generator().manual_seed(0)).to(device)
    losses = []
    for offload in (False, True):
        model = Toy().to(device)
        zero = make_zero(model, Ranks(device=device), adamw, stage=2, dtype=dtype, offload=offload)
        seen = []
        for _ in range(5):
            with zero.synced(True):
                loss = model(rows, torch.arange(16, device=device))
                loss.backward()
            assert zero.squares().device.type == "cuda"
            zero.step(torch.tensor(0.5, device=device))
            seen.append(loss.item())
        losses.append(seen)
        masters = {bucket.master.device.type for bucket in zero.buckets}
        assert masters == {"cpu" if offload else "cuda"}
    assert losses[0] == pytest.approx(losses[1], rel=limit)


def test_what_was_frozen_when_it_was_made_must_have_no_gradient():
    model = Toy()
    model.wide.requires_grad_(False)
    zero = make_zero(model, ALONE)
    assert "wide" not in {name for bucket in zero.buckets for name in bucket.parameters}
    model.wide.requires_grad_(True)
    backward(model, [zero], 0, ALONE)
    with pytest.raises(RuntimeError, match="wide has a gradient, but was frozen"):
        zero.step()
    zero.zero_grad()
    assert model.wide.grad is None
