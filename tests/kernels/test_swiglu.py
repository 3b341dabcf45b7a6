"""The Triton activations of the MLP answer to the reference."""

import pytest
import torch
from hypothesis import strategies as st

from minillm.kernels import swiglu as room
from minillm.kernels.swiglu import geglu, relu2, swiglu
from minillm.ops import REFERENCE
from tests.support.broad import broad, searched

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = [swiglu, geglu, relu2]
NAMES = [op.__name__ for op in OPS]


def numbers(shape, dtype, device, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    return x.to(device, dtype)


@searched(
    6,
    24,
    op=st.sampled_from(OPS),
    N=st.integers(1, 12),
    F=st.sampled_from([1, 7, 16, 255, 256, 300, 512, 1023, 1040]),
    dtype=st.sampled_from(DTYPES),
)
def test_values_and_gradients(check, device, op, N, F, dtype):
    check(op, {"x": numbers((N, F if op is relu2 else 2 * F), dtype, device)})


@broad("dtype", DTYPES, quick=(2,), ids=str)
@broad("op", OPS, ids=NAMES)
def test_strides(check, device, op, dtype):
    """Slices of rows and columns, a transposed tensor, one row, every second number."""
    wide = numbers((6, 5, 96), dtype, device)
    for x in (
        wide[..., :64], wide[::2, :, 32:], wide.transpose(0, 2), wide[0, 0], wide[0, :, ::2],
        wide[:2, :2].expand(3, 2, 2, 96),
    ):  # fmt: skip
        check(op, {"x": x})


@pytest.mark.parametrize("op", OPS, ids=NAMES)
def test_gradients_of_any_strides(device, op):
    """The incoming gradient is expanded, transposed or a slice."""
    x = numbers((5, 4, 32), torch.float32, device).requires_grad_()
    y = op(x)
    wide = numbers((y.shape[-1], 4, 10), torch.float32, device)
    for dy in (torch.ones((), device=device).expand(y.shape), wide.transpose(0, 2)[::2]):
        (ours,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        (same,) = torch.autograd.grad(y, x, dy.contiguous(), retain_graph=True)
        assert torch.equal(ours, same)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("op", OPS, ids=NAMES)
def test_empty(device, launches, op, shape):
    """No number: no launch, and results as empty as the reference's."""
    x = torch.ones(shape, device=device, requires_grad=True)
    y = op(x)
    y.sum().backward()
    assert y.shape == getattr(REFERENCE, op.__name__)(x).shape and x.grad.shape == shape
    assert not launches


def test_relu2_of_one_number(check, device):
    check(relu2, {"x": torch.tensor(3.0, device=device)})


@pytest.mark.parametrize("op", OPS, ids=NAMES)
def test_far_from_zero(check, device, op):
    """Where exponentials overflow no result is NaN; and NaN stays NaN."""
    x = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, 1.0, 2.0, 3.0, 4.0, 5.0]], device=device)
    check(op, {"x": x})
    assert op(torch.full((1, 2), torch.nan, device=device)).isnan().all()


@pytest.mark.parametrize("op", OPS, ids=NAMES)
def test_launches_and_repeats(device, launches, op):
    """One launch forward, one backward, only x saved; twice the same bits."""
    x = numbers((10, 3, 200), torch.bfloat16, device)
    saved = []

    def run():
        leaf = x.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = op(leaf)
        return y, *torch.autograd.grad(y, leaf, torch.ones_like(y))

    first, second = run(), run()
    assert launches == {"_swiglu_fwd_kernel": 2, "_swiglu_bwd_kernel": 2}
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [t.data_ptr() for t in saved] == [x.data_ptr()] * 2


@broad(
    ("name", "old", "new"),
    [
        ("swiglu", "tl.exp(-x)", "tl.exp(x)"),
        ("swiglu", "slope = share * (1 + x", "slope = share * (1 - x"),
        ("swiglu", "columns < F)", "columns < F - 1)"),
        ("swiglu", "rows < N)", "rows < N - 1)"),
        ("swiglu", "(program % blocks)", "((program % blocks) & 1)"),
        ("geglu", "0.3989422804014327", "0.5"),
        ("geglu", "slope * up * dy", "slope * dy"),
        ("geglu", "(gate * dy)", "(-gate * dy)"),
        ("relu2", "tl.where(x < 0, 0.0, x)", "x"),
        ("relu2", "2 * x) * dy", "x) * dy"),
    ],
    quick=(0, 1, 5, 9),
)
def test_a_broken_copy_is_seen(broken, check, device, name, old, new):
    copy = broken(room, old, new)
    with pytest.raises(AssertionError):
        check(getattr(copy, name), {"x": numbers((3, 4200), torch.float32, device)})


@pytest.mark.parametrize("op", OPS, ids=NAMES)
def test_opcheck(device, op):
    activation = {"swiglu": "silu", "geglu": "gelu", "relu2": "relu2"}[op.__name__]
    x, dy = (numbers((5, 16), torch.float32, device, seed) for seed in (0, 1))
    dy = dy if op is relu2 else dy[:, :8]
    torch.library.opcheck(room._swiglu, (x.requires_grad_(), activation))
    torch.library.opcheck(room._swiglu_bwd, (x.detach(), dy, activation))


@pytest.mark.parametrize("op", OPS, ids=NAMES)
def test_compile(device, op):
    """One graph, and the results of the plain call."""
    x = numbers((2, 5, 64), torch.bfloat16, device).requires_grad_()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    results = []
    for f in (op, compiled):
        y = f(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), x)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_refusals(device):
    with pytest.raises(ValueError, match=r"x: a tensor of shape \(2, 5\), expected \(\.\.\., 2F\)"):
        swiglu(torch.ones(2, 5, device=device))
    with pytest.raises(ValueError, match="x: torch.float64, expected one of"):
        relu2(torch.ones(2, 4, dtype=torch.float64, device=device))
