"""The Triton cross-entropy answers to the reference."""

import math
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.kernels import _loss, linear_cross_entropy as room
from minillm.kernels.linear_cross_entropy import linear_cross_entropy
from minillm.ops import REFERENCE
from tests.support.broad import broad, searched

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = {
    "plain": {},
    "soft-cap": {"softcap": 2.0},
    "z-loss": {"z_loss": 0.1},
    "all": {"softcap": 30.0, "z_loss": 1e-2, "ignore_index": 2},
    "index beyond the vocabulary ignored": {"ignore_index": 10**6},
}


def inputs(N, V, C, dtype, device, ignored=-100, seed=0):
    """x, w of logits that spread by 2 to 4, and targets, some of which do not count.

    All numbers are of few bits, so that logits are exact in fp32 in whatever order they are summed.
    """
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, generator=numbers).clamp(-4, 4).mul(8).round() / 8
    spread = 2 ** round(2 - math.log2(C) / 2)
    w = torch.randn(V, C, generator=numbers).clamp(-4, 4).mul(8).round() / 8 * spread
    targets = torch.randint(V, (N,), generator=numbers)
    targets[1::4] = ignored
    return {"x": x.to(device, dtype), "w": w.to(device, dtype)}, targets.to(device)


@pytest.fixture
def in_chunks(monkeypatch):
    """in_chunks(rows): so many rows a chunk, from here on."""

    def of(rows, module=room):
        monkeypatch.setattr(module, "CHUNK", 0)
        monkeypatch.setattr(module, "ROWS", rows)

    return of


@searched(
    6,
    24,
    N=st.integers(1, 14),
    V=st.sampled_from([1, 2, 13, 16, 127, 1000, 1024, 1025, 4096, 9001]),
    C=st.sampled_from([1, 5, 16, 33]),
    rows=st.sampled_from([1, 3, 5, 128]),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(sorted(OPTIONS)),
)
def test_values_and_gradients(check, in_chunks, device, N, V, C, rows, dtype, name):
    in_chunks(rows)
    options = OPTIONS[name]
    tensors, targets = inputs(N, V, C, dtype, device, options.get("ignore_index", -100))
    check(linear_cross_entropy, tensors, targets=targets, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(check, device, dtype):
    """Slices of rows and of columns, transposed matrices, every second target."""
    tensors, targets = inputs(24, 300, 48, dtype, device)
    x, w = tensors["x"], tensors["w"]
    some = targets.clamp(max=99)[::2]
    check(linear_cross_entropy, {"x": x[::2], "w": w[::3]}, targets=some)
    check(linear_cross_entropy, {"x": x[:, 16:], "w": w[:, :32]}, targets=targets)
    turned = {"x": x.t().contiguous().t(), "w": w.t().contiguous().t()}
    check(linear_cross_entropy, turned, targets=targets)


def test_weights_of_another_dtype(device):
    """fp32 weights under a bf16 stream: as if they were cast first; their gradient stays fp32."""
    tensors, targets = inputs(9, 100, 32, torch.bfloat16, device)
    x, w = tensors["x"].requires_grad_(), tensors["w"].float().requires_grad_()
    cast = w.detach().bfloat16().requires_grad_()
    ours = torch.autograd.grad(linear_cross_entropy(x, w, targets), (x, w))
    same = torch.autograd.grad(linear_cross_entropy(x, cast, targets), (x, cast))
    assert ours[1].dtype == torch.float32
    assert torch.equal(ours[0], same[0])
    torch.testing.assert_close(ours[1], same[1].float(), rtol=2**-7, atol=0)


def test_narrower_weights(check, device):
    """bf16 weights under an fp32 stream are widened; their gradient is rounded to bf16."""
    tensors, targets = inputs(9, 100, 32, torch.float32, device)
    check(linear_cross_entropy, {**tensors, "w": tensors["w"].bfloat16()}, targets=targets)


@pytest.mark.parametrize("n", [0, 5])
def test_no_row_counts(device, n):
    """nan, as the mean of nothing is, and gradients of zero; without rows too."""
    tensors, targets = inputs(n, 20, 8, torch.bfloat16, device)
    leaves = [x.requires_grad_() for x in tensors.values()]
    for op in (linear_cross_entropy, REFERENCE.linear_cross_entropy):
        loss = op(*leaves, torch.full_like(targets, -100))
        assert loss.isnan() and loss.dtype == torch.float32
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
            assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
            assert not gradient.any()


@pytest.mark.parametrize("target", [-1, 20, 10**9])
def test_a_target_outside_the_vocabulary_is_nan(device, target):
    """Nothing is read beyond the logits, and nothing goes unnoticed."""
    tensors, targets = inputs(4, 20, 8, torch.float32, device)
    targets[2] = target
    leaves = [x.requires_grad_() for x in tensors.values()]
    loss = linear_cross_entropy(*leaves, targets)
    loss.backward()
    assert loss.isnan() and leaves[0].grad[2].isnan().all() and not leaves[0].grad[0].isnan().any()


def test_no_vocabulary(device):
    """Every target is outside: nan, and a gradient for w that is as empty as w."""
    tensors, targets = inputs(4, 20, 8, torch.float32, device)
    w = tensors["w"][:0].requires_grad_()
    loss = linear_cross_entropy(tensors["x"], w, targets)
    loss.backward()
    assert loss.isnan() and w.grad.shape == (0, 8)


def test_far_from_zero(check, device):
    """Logits of +-8000 overflow nothing."""
    x = torch.tensor([[2000.0], [-2000.0], [0.0]], device=device)
    w = torch.tensor([[4.0], [-4.0], [0.5], [0.0]], device=device)
    check(linear_cross_entropy, {"x": x, "w": w}, targets=torch.tensor([1, 2, 3], device=device))


def test_launches_and_repeats(in_chunks, device, launches):
    """One launch a chunk, none backward; twice the same bits; dx alone if only dx is wanted."""
    in_chunks(4)
    tensors, targets = inputs(10, 100, 16, torch.bfloat16, device)

    def run():
        leaves = [x.detach().requires_grad_() for x in tensors.values()]
        loss = linear_cross_entropy(*leaves, targets, softcap=3.0)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    first, second = run(), run()
    assert launches == {"_linear_cross_entropy_kernel": 6}
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(*tensors.values(), targets, softcap=3.0), first[0])
    x, w = tensors["x"].detach().requires_grad_(), tensors["w"].detach()
    (dx,) = torch.autograd.grad(linear_cross_entropy(x, w, targets, softcap=3.0), x)
    assert torch.equal(dx, first[1])


class Watch(TorchDispatchMode):
    """How often each operation of PyTorch runs, and the most numbers that one returns.

    Floating numbers only: the interpreter copies what a kernel is given, as bytes.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.largest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.calls[func.overloadpacket.__name__] += 1
        self.largest = max([self.largest, *(t.numel() for t in made if t.is_floating_point())])
        return result


@broad("dtype", [torch.float32, torch.bfloat16], quick=(1,), ids=str)
@pytest.mark.parametrize(
    ("train_x", "train_w", "products"),
    [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)],
)
def test_what_is_made(in_chunks, device, dtype, train_x, train_w, products):
    """A chunk of 8 rows of logits at most, never all 24; no product that nobody wants; no waiting.

    The operators' own functions are watched, as one sees no further than an operator's name.
    """
    in_chunks(8)
    tensors, targets = inputs(24, 1000, 4, dtype, device)
    with Watch() as watch, torch.no_grad():
        loss, *saved = room._linear_cross_entropy._init_fn(
            **tensors, targets=targets, softcap=3.0, z_loss=0.1, ignore_index=-100,
            train_x=train_x, train_w=train_w,
        )  # fmt: skip
        _loss.scaled._init_fn(*saved, torch.ones_like(loss), dtype, dtype)
    assert watch.largest == 8 * 1008
    assert watch.calls["addmm"] == 3 * products
    assert not {"_local_scalar_dense", "nonzero", "mm", "matmul"} & set(watch.calls)
    assert [t.numel() for t in saved[:2]] == [24 * 4 * train_x, 1000 * 4 * train_w]


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "16 bits"])
def test_dw_is_summed_in_fp32(broken, check, in_chunks, device, narrow):
    """Over 100 chunks, where a sum in x's dtype errs visibly."""
    module = room
    if narrow:
        wide = "torch.zeros((V, C) if train_w else (0,), dtype=torch.float32"
        module = broken(room, wide, wide.replace("torch.float32", "x.dtype"))
    in_chunks(1, module)
    tensors, targets = inputs(100, 16, 8, torch.bfloat16, device)
    tensors["x"].abs_()  # so that the sums grow
    targets.zero_()
    with pytest.raises(AssertionError, match="result 2") if narrow else nullcontext():
        check(module.linear_cross_entropy, tensors, targets=targets)


def test_backward_twice(device):
    """What was saved is left alone, gradients go with the loss's own, and have none themselves."""
    tensors, targets = inputs(6, 40, 16, torch.bfloat16, device)
    leaves = [x.requires_grad_() for x in tensors.values()]
    loss = linear_cross_entropy(*leaves, targets)
    factors = [torch.tensor(f, device=device) for f in (1.0, 4.0, 1.0)]
    one, four, again = (torch.autograd.grad(loss, leaves, f, retain_graph=True) for f in factors)
    for a, b, c in zip(one, four, again, strict=True):
        assert torch.equal(a, c) and torch.equal(4 * a, b)
    (dx,) = torch.autograd.grad(loss.square(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd formula|does not require grad"):
        dx.sum().backward()


@broad(
    ("old", "new"),
    [
        ("if target == ignore_index:", "if target == ignore_index + 1:"),
        ("z = tl.where(columns < V, _cap(z", "z = tl.where(columns < stride, _cap(z"),
        ("z = tl.where(columns < V, _cap(z", "z = tl.where(columns < BLOCK_V, _cap(z"),
        ("dz = tl.where(columns < V,", "dz = tl.where(columns < BLOCK_V,"),
        ("row = tl.program_id(0)", "row = (tl.program_id(0) // 2 * 2)"),
        ("(targets != ignore_index).sum()", "(targets == targets).sum()"),
        ("p = tl.exp(z - peak) * scale", "p = -tl.exp(z - peak) * scale"),
        ("(peak - _cap(picked", "(peak + _cap(picked"),
        ("masses * tl.exp(peak - higher)", "masses"),
        ("tl.where(columns == target, gain, 0.0)", "tl.where(columns == target, -gain, 0.0)"),
        ("p * (2 * z_loss * lse)", "p * (z_loss * lse)"),
        ("dz *= 1 - (z / softcap)", "dz *= 1 + (z / softcap)"),
        ("_product(dw, dz.t(), rows_x, beta=1)", "_product(dw, dz.t(), rows_x)"),
        ("for start in range(0, N, rows or 1):", "for start in range(0, N - rows, rows or 1):"),
    ],
    quick=(0, 6, 9, 12),
)
def test_a_broken_copy_is_seen(broken, check, in_chunks, device, old, new):
    copy = broken(room, old, new)
    in_chunks(4, copy)
    tensors, targets = inputs(10, 4500, 16, torch.float32, device)
    with pytest.raises(AssertionError):
        check(copy.linear_cross_entropy, tensors, targets=targets, softcap=9.0, z_loss=0.1)


@pytest.mark.slow
def test_opcheck(device):
    tensors, targets = inputs(6, 40, 16, torch.float32, device)
    leaves = [x.requires_grad_() for x in tensors.values()]
    torch.library.opcheck(
        room._linear_cross_entropy, (*leaves, targets, 3.0, 0.1, -100, True, True)
    )
    dx, dw = (torch.ones_like(x.detach()) for x in leaves)
    scalars = torch.tensor(5, device=device), torch.tensor(2.0, device=device)
    dtypes = torch.float16, torch.float32
    torch.library.opcheck(_loss.scaled, (dx, dw, *scalars, *dtypes))


def test_compiles_as_one_graph(device):
    tensors, targets = inputs(6, 40, 16, torch.bfloat16, device)
    leaves = [x.requires_grad_() for x in tensors.values()]
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    found = []
    for op in (linear_cross_entropy, compiled):
        loss = op(*leaves, targets, z_loss=1e-3)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 8, dtype=torch.float64)}, "x: torch.float64, expected one of"),
        ({"w": torch.ones(20, 7)}, r"w: .*expected \(N, C\) and \(V, C\)"),
        ({"x": torch.ones(8)}, "x: "),
        ({"targets": torch.ones(4)}, r"targets: torch.float32 \(4,\), expected torch.int64 \(4,\)"),
        ({"targets": torch.ones(3, dtype=torch.int64)}, r"expected torch.int64 \(4,\)"),
    ],
    ids=["dtype", "widths", "shape", "floats", "length"],
)
def test_wrong_arguments(device, change, message):
    tensors, targets = inputs(4, 20, 8, torch.float32, device)
    wrong = {n: x.to(device) for n, x in change.items()}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**tensors, "targets": targets, **wrong})
