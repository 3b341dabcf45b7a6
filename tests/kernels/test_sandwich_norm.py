"""The Triton norm upon a norm answers to the reference."""

import pytest
import torch
from hypothesis import strategies as st

from minillm.kernels import sandwich_norm as room
from minillm.kernels.sandwich_norm import sandwich_norm
from tests.support.broad import broad, searched

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NARROW = {"BLOCK_N": 4, "num_warps": 4}
WIDE = {"BLOCK_N": 2, "BLOCK_C": 64, "STAGES": 2, "num_warps": 1}


def inputs(shape, dtype, device, seed=0):
    """The tensors of sandwich_norm, by name."""
    numbers = torch.Generator().manual_seed(seed)
    rows = (torch.randn(shape, generator=numbers).to(device, dtype) for _ in range(2))
    weights = (torch.randn(shape[-1], generator=numbers).to(device) for _ in range(2))
    return dict(zip(("x", "residual", "w_post", "w_pre"), (*rows, *weights), strict=True))


def few_programs(monkeypatch, copy=room) -> None:
    """So that each program has several blocks of rows without there being many rows."""

    def share(N, BLOCK_N, num_warps, device):
        blocks = max(1, -(-N // (BLOCK_N * 2)))
        return -(-N // (BLOCK_N * blocks)), blocks

    monkeypatch.setattr(copy, "share", share)


def wide(monkeypatch, copy=room) -> None:
    """From now on the backward pass goes through a row in several steps."""
    monkeypatch.setattr(copy, "tile", lambda _, kernel, C: WIDE if "bwd" in kernel else NARROW)


# One column is left out: h is then +-w_post whatever x, gradients cancel, and rounding is all.
@searched(4, 8, N=st.integers(1, 40), C=st.integers(2, 300), dtype=st.sampled_from(DTYPES))
def test_values_and_gradients(check, device, N, C, dtype):
    check(sandwich_norm, inputs((N, C), dtype, device), eps=1e-5)


@broad("dtype", DTYPES, quick=(2,), ids=str)
def test_strides(check, device, dtype):
    """A slice of columns, a slice of rows, a transposed tensor, an expanded one; weights apart."""
    for change in (
        lambda x: x[..., :64],
        lambda x: x[::2, :, 32:],
        lambda x: x.transpose(0, 2),
        lambda x: x[:1].expand(6, 5, 96),
    ):
        x, residual, *weights = inputs((6, 5, 96), dtype, device).values()
        x, residual = change(x), change(residual)
        w_post, w_pre = (torch.stack((w, -w), 1)[: x.shape[-1], 0] for w in weights)
        check(sandwich_norm, {"x": x, "residual": residual, "w_post": w_post, "w_pre": w_pre})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_every_dtype(check, device, dtype):
    """Each weight's gradient is in its own dtype."""
    values = inputs((33, 48), torch.bfloat16, device)
    check(sandwich_norm, values | {"w_post": values["w_post"].to(dtype)})
    check(sandwich_norm, values | {"w_pre": values["w_pre"].to(dtype)})


@broad("dtype", DTYPES, quick=(2,), ids=str)
def test_wide_rows(check, device, launches, monkeypatch, dtype):
    """Rows of which the backward pass holds only a part at a time."""
    wide(monkeypatch)
    few_programs(monkeypatch)
    for N, C in ((13, 200), (5, 129)):
        check(sandwich_norm, inputs((N, C), dtype, device))
    assert launches == {"_sandwich_norm_fwd_kernel": 2, "_sandwich_norm_wide_bwd_kernel": 2}


@broad("C", [8192, 16384])
def test_the_widest(check, device, launches, C):
    """As the tables have it, without a patched tile."""
    check(sandwich_norm, inputs((2, C), torch.bfloat16, device))
    assert launches["_sandwich_norm_wide_bwd_kernel"] == 1


def test_gradients_of_any_strides(device):
    """The incoming gradients are expanded, transposed or slices."""
    leaves = [t.requires_grad_() for t in inputs((4, 6), torch.float32, device).values()]
    y, h = sandwich_norm(*leaves)
    numbers = torch.Generator().manual_seed(1)
    one, two = (torch.randn(6, 12, generator=numbers).to(device) for _ in range(2))
    for dy, dh in (
        (torch.ones((), device=device).expand(4, 6), one.t()[::3]),
        (one[:4, ::2], two[:4, 6:]),
    ):
        ours = torch.autograd.grad((y, h), leaves, (dy, dh), retain_graph=True)
        clean = (dy.contiguous(), dh.contiguous())
        same = torch.autograd.grad((y, h), leaves, clean, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))


@pytest.mark.parametrize("shape", [(7, 24), (5, 200)], ids=["narrow", "wide"])
@pytest.mark.parametrize("used", ["y", "h"])
def test_only_one_result_is_used(device, monkeypatch, shape, used):
    """Gradients are those of zeros for the other."""
    if shape[1] == 200:
        wide(monkeypatch)
    values = inputs(shape, torch.float32, device).values()
    dy = torch.linspace(-1, 1, shape[0] * shape[1], device=device).view(shape)
    grads = []
    for alone in (True, False):
        leaves = [t.detach().requires_grad_() for t in values]
        outputs, given_ = sandwich_norm(*leaves), (dy, 0 * dy)
        if used == "h":
            outputs = outputs[::-1]
        if alone:
            outputs, given_ = outputs[:1], given_[:1]
        grads.append(torch.autograd.grad(outputs, leaves, given_))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_nothing_is_saved_without_a_backward_pass(device):
    """The sum and the inverse roots are written only where they will be read."""
    values = inputs((3, 16), torch.float32, device)
    seen = [tuple(t.shape) for t in room._sandwich_norm(*values.values(), 1e-6, False)]
    assert seen == [(3, 16), (3, 16), (0, 16), (2, 0)]
    plain = sandwich_norm(*values.values())
    with_grad = sandwich_norm(*(t.requires_grad_() for t in values.values()))
    with torch.no_grad():
        without = sandwich_norm(*values.values())
    for y in (with_grad, without):
        assert all(torch.equal(a, b) for a, b in zip(plain, y, strict=True))
    assert with_grad[0].requires_grad and not without[0].requires_grad


def test_empty(device, launches):
    """No row: no launch, and gradients of zero."""
    values = inputs((2, 0, 8), torch.float32, device)
    y, h = sandwich_norm(*[t.requires_grad_() for t in values.values()])
    (y.sum() + h.sum()).backward()
    assert y.shape == h.shape == (2, 0, 8)
    for name in ("w_post", "w_pre"):
        assert torch.equal(values[name].grad, torch.zeros(8, device=device))
    assert not launches


def test_launches_and_repeats(device, launches):
    """One launch forward, one backward; twice the same bits."""
    values = inputs((60, 100), torch.float32, device).values()

    def run():
        leaves = [t.detach().requires_grad_() for t in values]
        y = sandwich_norm(*leaves)
        return *y, *torch.autograd.grad(sum(t.square().sum() for t in y), leaves)

    first, second = run(), run()
    assert launches == {"_sandwich_norm_fwd_kernel": 2, "_sandwich_norm_bwd_kernel": 2}
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@broad(
    ("kernel", "old", "new"),
    [
        ("narrow", "x += load_tile(residual_ptr", "x -= load_tile(residual_ptr"),
        ("narrow", "x * rstd_pre * load_row", "-x * rstd_pre * load_row"),
        ("narrow", "dh = (dy - h", "dh = (dy + h"),
        ("narrow", "ds = (dh - s", "ds = (dh + s"),
        ("narrow", "dy *= w_pre\n", "dy *= 1\n"),
        ("narrow", "dh *= w_post\n", "dh *= 1\n"),
        ("narrow", "i in tl.range(0, blocks,", "i in tl.range(0, blocks - 1,"),
        ("narrow", "tl.store(dw_ptr + C + columns, dw_pre, mask=columns < C)\n\n",
         "tl.store(dw_ptr + C + columns, dw_pre, mask=columns < C - 1)\n\n"),
        ("wide", "products += dy * w_pre", "products -= dy * w_pre"),
        ("wide", "products += dh * w_post", "products -= dh * w_post"),
        ("wide", "dw_ptr, columns, (columns < C) & (i > 0)", "dw_ptr, columns, columns < 0"),
        ("wide", "dw_ptr + C, columns, (columns < C) & (i > 0)", "dw_ptr, columns, columns < 0"),
        ("wide", "for i in range(blocks)", "for i in range(blocks - 1)"),
        ("wide", "tl.static_range(3)", "tl.static_range(1, 3)"),
        ("wide", " - s * mean_post) * rstd_post", " - s * mean_post)"),
    ], quick=(0, 2, 8),
)  # fmt: skip
def test_a_broken_copy_is_seen(broken, check, device, monkeypatch, kernel, old, new):
    copy = broken(room, old, new)
    few_programs(monkeypatch, copy)
    if kernel == "wide":
        wide(monkeypatch, copy)
    with pytest.raises(AssertionError):
        check(copy.sandwich_norm, inputs((20, 150), torch.float32, device))


def test_opcheck(device):
    x, residual, w_post, w_pre = inputs((5, 16), torch.float32, device).values()
    leaves = [t.clone().requires_grad_() for t in (x, residual, w_post, w_pre)]
    torch.library.opcheck(room._sandwich_norm, (*leaves, 1e-6, True))
    torch.library.opcheck(room._sandwich_norm, (x, residual, w_post, w_pre, 1e-6, False))
    rstd = torch.ones(2, 5, device=device)
    for dh in (None, residual):
        torch.library.opcheck(room._sandwich_norm_bwd, (x, w_post, w_pre, rstd, residual, dh))


def test_compile(device):
    """One graph, and the results of the plain call."""
    values = inputs((2, 5, 64), torch.bfloat16, device).values()
    results = []
    for f in (sandwich_norm, torch.compile(sandwich_norm, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().requires_grad_() for t in values]
        y = f(*leaves)
        loss = sum(t.float().square().sum() for t in y)
        results.append([*y, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_refusals(device):
    x, w = torch.ones(2, 4, device=device), torch.ones(4, device=device)
    with pytest.raises(ValueError, match=r"w_pre: shape \(3,\), expected \(4,\)"):
        sandwich_norm(x, x, w, w[:3])
    with pytest.raises(ValueError, match="residual: .*expected x's"):
        sandwich_norm(x, x[:1], w, w)
    with pytest.raises(ValueError, match="w_post: torch.float64, expected one of"):
        sandwich_norm(x, x, w.double(), w)
    with pytest.raises(ValueError, match="with C from 1 to 16384"):
        sandwich_norm(*[torch.ones(1, 16385, device=device)] * 2, w, w)
