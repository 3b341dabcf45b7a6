"""The Triton norms of one weight answer to the reference."""

import pytest
import torch
from hypothesis import strategies as st

from minillm.kernels import _rows, rms_norm as room
from minillm.kernels.rms_norm import add_rms_norm, rms_norm
from tests.support.broad import broad, searched

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDE = {"BLOCK_N": 2, "BLOCK_C": 64, "STAGES": 2, "num_warps": 1}


def inputs(op, shape, dtype, device, seed=0):
    """The tensors `op` takes, by name."""
    numbers = torch.Generator().manual_seed(seed)
    names = ["x"] if op.__name__ == "rms_norm" else ["x", "residual"]
    made = {n: torch.randn(shape, generator=numbers).to(device, dtype) for n in names}
    return made | {"w": torch.randn(shape[-1], generator=numbers).to(device)}


@pytest.fixture
def wide(monkeypatch):
    """wide(): from now on the backward pass goes through a row in several steps."""

    def patch(*rooms) -> None:
        for each in (room, *rooms):
            monkeypatch.setattr(each, "tile", lambda _, kernel, C: WIDE if kernel == "bwd" else
                                {"BLOCK_N": 4, "num_warps": 4})  # fmt: skip

    return patch


def few_programs(monkeypatch, *rooms) -> None:
    """So that each program has several blocks of rows without there being many rows."""

    def share(N, BLOCK_N, num_warps, device):
        blocks = max(1, -(-N // (BLOCK_N * 2)))
        return -(-N // (BLOCK_N * blocks)), blocks

    for each in rooms:
        monkeypatch.setattr(each, "share", share)


# One column is left out: y is then x / |x| whatever x, dx cancels, and rounding is all there is.
@pytest.mark.parametrize("op", [rms_norm, add_rms_norm], ids=lambda op: op.__name__)
@searched(3, 8, N=st.integers(1, 40), C=st.integers(2, 300), dtype=st.sampled_from(DTYPES))
def test_values_and_gradients(check, device, op, N, C, dtype):
    check(op, inputs(op, (N, C), dtype, device), eps=1e-5)


@pytest.mark.parametrize("op", [rms_norm, add_rms_norm], ids=lambda op: op.__name__)
@broad("dtype", DTYPES, quick=(2,), ids=str)
def test_strides(check, device, op, dtype):
    """A slice of columns, a slice of rows, a transposed tensor, an expanded one; weights apart."""
    for change in (
        lambda x: x[..., :64],
        lambda x: x[::2, :, 32:],
        lambda x: x.transpose(0, 2),
        lambda x: x[:1].expand(6, 5, 96),
    ):
        given_ = inputs(op, (6, 5, 96), dtype, device)
        w = given_.pop("w")
        changed = {name: change(x) for name, x in given_.items()}
        apart = torch.stack((w, -w), 1)[: changed["x"].shape[-1], 0]
        check(op, changed | {"w": apart})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_every_dtype(check, device, dtype):
    """The weight's gradient is in the weight's dtype."""
    given_ = inputs(rms_norm, (33, 48), torch.bfloat16, device)
    check(rms_norm, {"x": given_["x"], "w": given_["w"].to(dtype)})


def test_gradients_of_any_strides(device):
    """The incoming gradients are expanded, transposed or slices."""
    leaves = [
        t.requires_grad_() for t in inputs(add_rms_norm, (4, 6), torch.float32, device).values()
    ]
    y, s = add_rms_norm(*leaves)
    one, two = (torch.randn(6, 12, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    for dy, ds in (
        (torch.ones((), device=device).expand(4, 6), one.to(device).t()[::3]),
        (one.to(device)[:4, ::2], two.to(device)[:4, 6:]),
    ):
        ours = torch.autograd.grad((y, s), leaves, (dy, ds), retain_graph=True)
        clean = (dy.contiguous(), ds.contiguous())
        same = torch.autograd.grad((y, s), leaves, clean, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))


@broad("dtype", DTYPES, quick=(2,), ids=str)
@pytest.mark.parametrize("op", [rms_norm, add_rms_norm], ids=lambda op: op.__name__)
def test_wide_rows(check, device, launches, monkeypatch, wide, op, dtype):
    """Rows of which the backward pass holds only a part at a time."""
    wide()
    few_programs(monkeypatch, room)
    for N, C in ((13, 200), (5, 129)):
        check(op, inputs(op, (N, C), dtype, device))
    assert launches["_rms_norm_wide_bwd_kernel"] == 2 and not launches["_rms_norm_bwd_kernel"]


def test_the_widest(check, device, launches):
    """As the tables have it, without a patched tile; one column more is refused."""
    check(add_rms_norm, inputs(add_rms_norm, (2, 16384), torch.bfloat16, device))
    assert launches["_rms_norm_wide_bwd_kernel"] == 1
    with pytest.raises(ValueError, match="with C from 1 to 16384"):
        rms_norm(torch.ones(1, 16385, device=device), torch.ones(16385, device=device))


@pytest.mark.parametrize("used", ["y", "s"])
def test_only_one_result_is_used(device, launches, used):
    """What nobody asks for costs nothing, and the gradients are those of zeros for it."""
    values = inputs(add_rms_norm, (7, 24), torch.float32, device).values()
    grads = []
    for both in (False, True):
        leaves = [t.detach().requires_grad_() for t in values]
        y, s = add_rms_norm(*leaves)
        dy = torch.linspace(-1, 1, y.numel(), device=device).view_as(y)
        outputs, given_ = ((y,), (dy,)) if used == "y" else ((s,), (dy,))
        if both:
            given_ = (dy, 0 * dy) if used == "y" else (0 * dy, dy)
            outputs = (y, s)
        grads.append(torch.autograd.grad(outputs, leaves[:2], given_))
        if not both:
            assert launches["_rms_norm_bwd_kernel"] == (1 if used == "y" else 0)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("op", [rms_norm, add_rms_norm], ids=lambda op: op.__name__)
def test_empty(device, launches, op):
    """No row: no launch, and gradients of zero."""
    values = inputs(op, (2, 0, 8), torch.float32, device)
    y = op(*[t.requires_grad_() for t in values.values()])
    y = y[0] if isinstance(y, tuple) else y
    y.sum().backward()
    assert y.shape == (2, 0, 8) and torch.equal(values["w"].grad, torch.zeros(8, device=device))
    assert not launches


@pytest.mark.parametrize("op", [rms_norm, add_rms_norm], ids=lambda op: op.__name__)
def test_launches_and_repeats(device, launches, op):
    """One launch forward, one backward; twice the same bits."""
    values = inputs(op, (60, 100), torch.float32, device).values()

    def run():
        leaves = [t.detach().requires_grad_() for t in values]
        y = op(*leaves)
        y = y if isinstance(y, tuple) else (y,)
        return *y, *torch.autograd.grad(sum(t.square().sum() for t in y), leaves)

    first, second = run(), run()
    assert launches == {"_rms_norm_fwd_kernel": 2, "_rms_norm_bwd_kernel": 2}
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@broad(
    ("kernel", "old", "new"),
    [
        ("narrow", "y = x * rstd", "y = -x * rstd"),
        ("narrow", "dx = (dy - x", "dx = (dy + x"),
        ("narrow", "dy *= w\n", "dy *= 1\n"),
        ("narrow", "i in tl.range(0, blocks,", "i in tl.range(0, blocks - 1,"),
        ("narrow", "x += load_tile(residual_ptr", "x -= load_tile(residual_ptr"),
        ("narrow", "store(y_ptr + rows * C + columns, y, mask)",
         "store(y_ptr + rows * C + columns, y, mask & (columns < C - 1))"),
        ("wide", "products += x * dy", "products -= x * dy"),
        ("wide", "dw_ptr, columns, (columns < C) & (i > 0)", "dw_ptr, columns, columns < 0"),
        ("wide", "for i in range(blocks)", "for i in range(blocks - 1)"),
        ("wide", " - x * mean) * rstd", " - x * mean)"),
        ("wide", "tl.store(dw_ptr + columns, dw, mask=columns < C)\n            dx",
         "tl.store(dw_ptr + columns, dw, mask=columns < C - 1)\n            dx"),
    ], quick=(0, 1, 6),
)  # fmt: skip
def test_a_broken_copy_is_seen(broken, check, device, monkeypatch, wide, kernel, old, new):
    copy = broken(room, old, new)
    few_programs(monkeypatch, copy)
    if kernel == "wide":
        wide(copy)
    with pytest.raises(AssertionError):
        check(copy.add_rms_norm, inputs(copy.add_rms_norm, (40, 150), torch.float32, device))


def test_opcheck(device):
    x, residual, w = inputs(add_rms_norm, (5, 16), torch.float32, device).values()
    leaves = [t.clone().requires_grad_() for t in (x, residual, w)]
    torch.library.opcheck(room._rms_norm, (leaves[0], leaves[2], 1e-6))
    torch.library.opcheck(room._add_rms_norm, (*leaves, 1e-6))
    rstd = torch.ones(5, device=device)
    for ds in (None, residual):
        torch.library.opcheck(room._rms_norm_bwd, (x, w, rstd, residual, ds))


@pytest.mark.parametrize("op", [rms_norm, add_rms_norm], ids=lambda op: op.__name__)
def test_compile(device, op):
    """One graph, and the results of the plain call."""
    values = inputs(op, (2, 5, 64), torch.bfloat16, device).values()
    results = []
    for f in (op, torch.compile(op, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().requires_grad_() for t in values]
        y = f(*leaves)
        y = y if isinstance(y, tuple) else (y,)
        loss = sum(t.float().square().sum() for t in y)
        results.append([*y, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_sharing_of_rows(device):
    """Every row belongs to one block of one program, whatever N."""
    for N in (0, 1, 7, 1056, 1057, 100_003):
        programs, blocks = _rows.share(N, 2, 4, device)
        assert programs * blocks * 2 >= N > (programs - 1) * blocks * 2 or N == programs == 0


def test_refusals(device):
    x, w = torch.ones(2, 4, device=device), torch.ones(4, device=device)
    with pytest.raises(ValueError, match="x: torch.float64, expected one of"):
        rms_norm(x.double(), w)
    with pytest.raises(ValueError, match=r"w: shape \(3,\), expected \(4,\)"):
        rms_norm(x, w[:3])
    with pytest.raises(ValueError, match=r"x: shape \(\), expected \(\.\.\., C\)"):
        rms_norm(x[0, 0], w)
    with pytest.raises(ValueError, match="residual: .*expected x's"):
        add_rms_norm(x, x.half(), w)
