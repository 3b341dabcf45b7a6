"""Operations under torch.func, forward-mode derivatives, autocast and torch.compile."""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad

from minillm.kernels import (
    attention,
    decode_attention,
    linear_cross_entropy,
    newton_schulz,
    rms_norm,
    rope,
    sandwich_norm,
    swiglu,
)
from minillm.ops import EAGER
from tests.support.broad import broad

B, T, H, D, C = 2, 5, 2, 8, 16
ANGLES = torch.linspace(0, 3, T * D // 2).reshape(T, D // 2)
TARGETS = torch.tensor([3, 1, -100, 0, 7, 7, 2, 6, 5, 4])
TRITON = {
    "rms_norm": rms_norm.rms_norm,
    "add_rms_norm": rms_norm.add_rms_norm,
    "sandwich_norm": sandwich_norm.sandwich_norm,
    "rope": rope.rope,
    "attention": attention.attention,
    "decode_attention": decode_attention.decode_attention,
    "swiglu": swiglu.swiglu,
    "geglu": swiglu.geglu,
    "relu2": swiglu.relu2,
    "linear_cross_entropy": linear_cross_entropy.linear_cross_entropy,
    "newton_schulz": newton_schulz.newton_schulz,
}
SHAPES = {
    "rms_norm": [(B, T, C), (C,)],
    "add_rms_norm": [(B, T, C), (B, T, C), (C,)],
    "sandwich_norm": [(B, T, C), (B, T, C), (C,), (C,)],
    "rope": [(B, T, H, D), (B, T, H, D)],
    "attention": [(B, T, H, D)] * 3,
    "decode_attention": [(B, T, H, D)] * 3,
    "swiglu": [(B, T, C)],
    "geglu": [(B, T, C)],
    "relu2": [(B, T, C)],
    "linear_cross_entropy": [(B * T, C), (9, C)],
    "newton_schulz": [(T, C)],
}
OTHERS = {"rope": (ANGLES.cos(), ANGLES.sin()), "linear_cross_entropy": (TARGETS,)}
WITH_GRADIENTS = [name for name in TRITON if name not in ("decode_attention", "newton_schulz")]


def inputs(name, generator):
    return [torch.randn(shape, generator=generator) for shape in SHAPES[name]]


def total(table, name):
    """A function of the inputs alone that gives one number, in which results count differently."""
    op = TRITON[name] if table == "triton" else getattr(EAGER, name)

    def number(*tensors):
        y = op(*tensors, *OTHERS.get(name, ()))
        return sum(
            (n + 1) * t.square().sum() for n, t in enumerate(y if isinstance(y, tuple) else [y])
        )

    return number


@pytest.mark.parametrize("name", TRITON)
def test_forward_mode_is_refused_and_not_zero(generator, name):
    tensors = inputs(name, generator)
    with pytest.raises(RuntimeError, match=f"{name}: no forward-mode derivative"):
        torch.func.jvp(total("triton", name), tuple(tensors), tuple(tensors))
    with forward_ad.dual_level():
        tensors[-1] = forward_ad.make_dual(tensors[-1], torch.ones_like(tensors[-1]))
        with pytest.raises(RuntimeError, match=f"{name}: no forward-mode derivative"):
            total("triton", name)(*tensors)


def test_forward_mode_of_the_eager_loss_is_refused(generator):
    tensors = tuple(inputs("linear_cross_entropy", generator))
    with pytest.raises(RuntimeError, match="linear_cross_entropy: no forward-mode derivative"):
        torch.func.jvp(total("eager", "linear_cross_entropy"), tensors, tensors)


@pytest.mark.parametrize(("name", "options"), [
    ("attention", {"softcap": 5.0}), ("decode_attention", {"softcap": 5.0}), ("newton_schulz", {}),
])  # fmt: skip
def test_forward_mode_of_the_eager_table_is_not_refused_where_pytorch_has_it(
    generator, name, options
):
    tensors, tangents = inputs(name, generator), inputs(name, generator)
    operation = partial(getattr(EAGER, name), **options)
    _, ours = torch.func.jvp(operation, tuple(tensors), tuple(tangents))
    wide = [[x.double() for x in group] for group in (tensors, tangents)]
    ahead, behind = (
        operation(*(x + sign * 1e-6 * dx for x, dx in zip(*wide, strict=True))) for sign in (1, -1)
    )
    torch.testing.assert_close(ours.double(), (ahead - behind) / 2e-6, rtol=1e-4, atol=1e-4)


def test_forward_mode_of_bf16_attention_is_refused(generator):
    tensors = tuple(x.bfloat16() for x in inputs("attention", generator))
    with pytest.raises(RuntimeError, match="attention: no forward-mode derivative"):
        torch.func.jvp(EAGER.attention, tensors, tensors)


@pytest.mark.parametrize("table", ["eager", "triton"])
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_func_grad_is_the_gradient(generator, name, table):
    tensors = inputs(name, generator)
    number = total(table, name)
    arguments = tuple(range(len(tensors)))
    ours = torch.func.grad(number, arguments)(*tensors)
    leaves = [x.requires_grad_() for x in tensors]
    for x, y in zip(ours, torch.autograd.grad(number(*leaves), leaves), strict=True):
        torch.testing.assert_close(x, y)
        assert x.abs().max() > 0


def test_func_grad_of_bf16_attention(generator):
    tensors = [x.bfloat16() for x in inputs("attention", generator)]
    ours = torch.func.grad(total("eager", "attention"), (0, 1, 2))(*tensors)
    leaves = [x.requires_grad_() for x in tensors]
    theirs = torch.autograd.grad(total("eager", "attention")(*leaves), leaves)
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@broad(("name", "table"), [("linear_cross_entropy", "eager"),
    ("linear_cross_entropy", "triton"), ("rms_norm", "triton"), ("attention", "triton"),
], quick=3)  # fmt: skip
def test_gradients_a_sample(generator, name, table):
    """torch.func.vmap over torch.func.grad."""
    first, *rest = inputs(name, generator)
    batch = torch.stack((first, 2 * first, first - 1))
    grad = torch.func.grad(total(table, name))
    ours = torch.func.vmap(grad, in_dims=(0, *[None] * len(rest)))(batch, *rest)
    for x, y in zip(ours, batch, strict=True):
        torch.testing.assert_close(x, grad(y, *rest))


@pytest.mark.parametrize(("name", "table"), [("linear_cross_entropy", "eager"),
    ("linear_cross_entropy", "triton"), ("rms_norm", "triton"), ("attention", "triton"),
    ("swiglu", "triton")])  # fmt: skip
def test_second_derivatives_by_func_are_refused(generator, name, table):
    first, *rest = inputs(name, generator)
    grad = torch.func.grad(total(table, name))
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: grad(x, *rest).square().sum())(first)
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda x: grad(x, *rest), (first,), (first,))


def changed(name, tensors, dtypes):
    return [x.to(dtype) for x, dtype in zip(tensors, dtypes, strict=False)] + tensors[len(dtypes) :]


FP32, BF16 = torch.float32, torch.bfloat16
MIXED = {
    "all fp32": (),
    "first bf16": (BF16,),
    "second bf16": (FP32, BF16),
    "first two bf16": (BF16, BF16),
    "all bf16": (BF16,) * 4,
}


@broad("dtypes", MIXED, quick=(1, 4))
@pytest.mark.parametrize("name", TRITON)
def test_autocast_gives_what_the_eager_table_gives(generator, name, dtypes):
    """The same dtypes, the same numbers to bf16, and gradients in the dtypes of the inputs."""
    dtypes = MIXED[dtypes][: len(SHAPES[name])]
    tensors = changed(name, inputs(name, generator), dtypes)
    found = []
    for op in (TRITON[name], getattr(EAGER, name)):
        leaves = [x.detach().requires_grad_() for x in tensors]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = op(*leaves, *OTHERS.get(name, ()))
        y = list(y) if isinstance(y, tuple) else [y]
        wanted = [torch.zeros(())]
        if name in WITH_GRADIENTS:
            wanted = torch.autograd.grad(sum(t.float().square().sum() for t in y), leaves)
            assert [g.dtype for g in wanted] == [x.dtype for x in leaves]
        found.append([*(t.detach() for t in y), *wanted])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype or name == "rope"  # both of one dtype, the wider
        error = (ours.double() - theirs.double()).norm()
        assert error <= 2**-4 * max(theirs.double().norm(), 1e-9)


def test_autocast_in_fp16_and_not_of_fp64(generator):
    x, w = inputs("linear_cross_entropy", generator)
    q = inputs("attention", generator)
    with torch.autocast("cpu", dtype=torch.float16):
        for op in (EAGER.linear_cross_entropy, linear_cross_entropy.linear_cross_entropy):
            assert op(x, w, TARGETS).dtype == torch.float32
        assert attention.attention(*q).dtype == torch.float32
        exact = EAGER.linear_cross_entropy(x.double(), w.double(), TARGETS)
    assert torch.equal(exact, EAGER.linear_cross_entropy(x.double(), w.double(), TARGETS))


@broad("name", WITH_GRADIENTS, quick=(0, 4))
def test_the_eager_table_compiles_as_one_graph(generator, name):
    tensors = inputs(name, generator)
    dtype = torch.bfloat16 if name == "attention" else torch.float32
    found = []
    number = total("eager", name)
    torch.compiler.reset()
    for function in (number, torch.compile(number, fullgraph=True, backend="aot_eager")):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        y = function(*leaves)
        found.append([y.detach(), *torch.autograd.grad(y, leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_operations_do_not_share_a_limit_of_recompilation(generator):
    """Each may be compiled once, and is, whatever others have been compiled before it."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        for name in ("rms_norm", "swiglu", "geglu", "relu2"):
            compiled = torch.compile(TRITON[name], fullgraph=True, backend="aot_eager")
            assert compiled(*inputs(name, generator)).isfinite().all()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_decode_attention_with_lengths_compiles_and_transforms(generator):
    q, k, v = (torch.randn((2, 3, 5, H, D), generator=generator) for _ in range(3))  # 2 samples
    lengths = torch.tensor([5, 2, 3])
    k[:, 1, 2:] = v[:, 1, 2:] = torch.nan

    def function(q, k, v):
        return EAGER.decode_attention(q[:, -2:], k, v, lengths)

    expected = torch.stack([function(*sample) for sample in zip(q, k, v, strict=True)])
    assert expected.isfinite().all()
    torch.testing.assert_close(torch.func.vmap(function)(q, k, v), expected)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q[0], k[0], v[0]), expected[0])
