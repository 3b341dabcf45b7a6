"""The fast PyTorch paths answer to the reference: values, every gradient, odd sizes, strides."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from minillm.kernels.eager import attention as eager_attention, loss as eager_loss
from minillm.ops import EAGER, REFERENCE
from tests.support.broad import broad

B, H, G, D, C = 2, 4, 2, 8, 24
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SLOPES = 0.5 ** torch.arange(1, H + 1)


def documents(T):
    """Two documents a row, three in the second."""
    t = torch.arange(T)
    return torch.stack((t >= T // 2, 2 * (t >= T // 3).long() + (t >= T // 2))).long()


def heads(T):
    return {"q": (B, T, H, D), "k": (B, T, G, D), "v": (B, T, G, D)}


def rotary(T, *lead):
    angles = torch.linspace(0, 7, T * D // 2).reshape(T, D // 2).expand(*lead, T, D // 2)
    return {"cos": angles.cos(), "sin": angles.sin()}


# name: (operation, shapes of the inputs that have gradients, the other arguments), for a length T
CASES = {
    "rms_norm": lambda T: ("rms_norm", {"x": (B, T, C), "w": (C,)}, {"eps": 1e-5}),
    "add_rms_norm": lambda T: (
        "add_rms_norm",
        {"x": (B, T, C), "residual": (B, T, C), "w": (C,)},
        {"eps": 1e-5},
    ),
    "sandwich_norm": lambda T: (
        "sandwich_norm",
        {"x": (B, T, C), "residual": (B, T, C), "w_post": (C,), "w_pre": (C,)},
        {"eps": 1e-5},
    ),
    "rope": lambda T: ("rope", {"q": (B, T, H, D), "k": (B, T, G, D)}, rotary(T)),
    "rope, a table a row": lambda T: (
        "rope",
        {"q": (B, T, H, D), "k": (B, T, G, D)},
        rotary(T, B),
    ),
    "rope with qk-norm": lambda T: (
        "rope",
        {"q": (B, T, H, D), "k": (B, T, G, D), "q_weight": (D,), "k_weight": (D,)},
        {**rotary(T), "eps": 1e-5},
    ),
    "attention": lambda T: ("attention", heads(T), {}),
    "attention, MHA": lambda T: ("attention", dict.fromkeys("qkv", (B, T, H, D)), {}),
    "attention, MHA, scale and window": lambda T: (
        "attention",
        dict.fromkeys("qkv", (B, T, H, D)),
        {"scale": 0.7, "window": 5},
    ),
    "attention, scale": lambda T: ("attention", heads(T), {"scale": 0.7}),
    "attention, window": lambda T: ("attention", heads(T), {"window": 5}),
    "attention, window of all but one": lambda T: (
        "attention",
        heads(T),
        {"window": max(1, T - 1)},
    ),
    "attention, window 1": lambda T: ("attention", heads(T), {"window": 1}),
    "attention, documents": lambda T: ("attention", heads(T), {"documents": documents(T)}),
    "attention, softcap": lambda T: ("attention", heads(T), {"softcap": 1.5}),
    "attention, alibi": lambda T: ("attention", heads(T), {"alibi_slopes": SLOPES}),
    "attention, all": lambda T: (
        "attention",
        heads(T),
        {"window": 5, "documents": documents(T), "alibi_slopes": SLOPES, "scale": 0.7},
    ),
    "swiglu": lambda T: ("swiglu", {"x": (B, T, 2 * C)}, {}),
    "geglu": lambda T: ("geglu", {"x": (B, T, 2 * C)}, {}),
    "relu2": lambda T: ("relu2", {"x": (B, T, C)}, {}),
}


def outputs_and_gradients(op, inputs, options, weights):
    """The outputs, then the gradients of their weighted sum, for each input."""
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    ys = op(**inputs, **options)
    ys = ys if isinstance(ys, tuple) else (ys,)
    total = sum((y * w.to(y.dtype)).sum() for y, w in zip(ys, weights, strict=False))
    return [*(y.detach() for y in ys), *torch.autograd.grad(total, list(inputs.values()))]


def widened(values):
    return {
        name: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for name, v in values.items()
    }


def draw(generator, shape, dtype, contiguous):
    if contiguous:
        return torch.randn(shape, generator=generator).to(dtype)
    wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype)
    return wide[..., ::2]


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("T", [1, 7, 63])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(generator, no_worse, name, dtype, T, contiguous):
    op, shapes, options = CASES[name](T)
    if op == "rope":  # the model makes its tables in the stream's dtype
        options = {k: v.to(dtype) if k in ("cos", "sin") else v for k, v in options.items()}
    inputs = {n: draw(generator, shape, dtype, contiguous) for n, shape in shapes.items()}
    weights = [torch.randn(inputs[n].shape, generator=generator) for n in ("q", "k") if n in inputs]
    if "x" in inputs:
        weights = [torch.randn(B, T, C, generator=generator) for _ in range(2)]
    before = {n: x.clone() for n, x in inputs.items()}

    truth = outputs_and_gradients(
        getattr(REFERENCE, op), widened(inputs), widened(options), weights
    )
    yardstick = outputs_and_gradients(getattr(REFERENCE, op), inputs, options, weights)
    ours = outputs_and_gradients(getattr(EAGER, op), inputs, options, weights)
    largest = 0.0
    if op == "attention":  # dq and dk sum scale p (dp - mean dp) k, and dp = dy v^T is the largest
        dp = torch.einsum("bthd,bshd->bhts", weights[0], inputs["v"].float().repeat_interleave(
            H // inputs["v"].shape[2], dim=2))  # fmt: skip
        factor = max(inputs[n].abs().max().item() for n in "qk")
        largest = options.get("scale", D**-0.5) * dp.abs().max().item() * factor
    no_worse(ours, yardstick, truth, largest)
    with torch.no_grad():  # another path in bf16
        ys = getattr(EAGER, op)(**inputs, **options)
    n = len(ys) if isinstance(ys, tuple) else 1
    no_worse(ys if n > 1 else [ys], yardstick[:n], truth[:n])
    for n, x in inputs.items():
        assert x.equal(before[n]), f"{n} was written to"


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_attention_in_parts_of_the_batch(monkeypatch, generator, rows):
    T = 7
    monkeypatch.setattr(eager_attention, "SCORES", rows * H * T * T)  # 0: not even one row fits
    q, k, v = (
        torch.randn(5, T, H, D, generator=generator).bfloat16().requires_grad_() for _ in range(3)
    )
    dy = torch.randn(5, T, H, D, generator=generator).bfloat16()
    together = torch.autograd.grad(EAGER.attention(q, k, v, window=3), (q, k, v), dy)
    for b in range(5):
        row = [x[b : b + 1].detach().requires_grad_() for x in (q, k, v)]
        alone = torch.autograd.grad(EAGER.attention(*row, window=3), row, dy[b : b + 1])
        for x, y in zip(together, alone, strict=True):
            torch.testing.assert_close(x[b : b + 1], y, rtol=2**-7, atol=2**-7)  # a bf16 ulp of 1


@pytest.mark.parametrize("positions", [0, 3, [0, 5]], ids=str)
@pytest.mark.parametrize("weights", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_rope_cache(generator, no_worse, dtype, weights, positions):
    T, S = 4, 12
    q, k, v = (torch.randn(B, T, n, D, generator=generator).to(dtype) for n in (H, G, G))
    caches = [torch.randn(3, B, S, G, D, generator=generator).to(dtype)[1] for _ in range(2)]
    tables = [t.to(dtype) for t in rotary(S).values()]
    norms = [torch.randn(D, generator=generator).to(dtype) for _ in range(2)] if weights else []
    where = torch.tensor(positions) if isinstance(positions, list) else positions

    def run(room, wide):
        x = [wide(t) for t in (q, k, v, *tables)]
        into = [wide(t.clone()) for t in caches]
        return [room.rope_cache(*x, *into, where, *map(wide, norms)), *into]

    plain = run(REFERENCE, lambda t: t)
    no_worse(run(EAGER, lambda t: t), plain, run(REFERENCE, torch.Tensor.double))
    # Said once more, from rope: the rows lie where they should and the others are untouched.
    starts = torch.as_tensor(where).expand(B)
    for b in range(B):
        rows = slice(int(starts[b]), int(starts[b]) + T)
        mine = REFERENCE.rope(q[b : b + 1], k[b : b + 1], *(t[rows] for t in tables), *norms)
        assert torch.equal(plain[0][b], mine[0][0])
        for cache, before, new in zip(plain[1:], caches, (mine[1][0], v[b]), strict=True):
            expected = before[b].clone()
            expected[rows] = new
            assert torch.equal(cache[b], expected)


@pytest.mark.parametrize("scaled", [False, True])
def test_adamw(generator, no_worse, scaled):
    shapes, rates, decays = [(3, 5), (7,), (2, 2)], [0.1, 0.02, 0.1], [0.1, 0.0, 0.3]
    start = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(4)]
    factor = torch.tensor(0.25) if scaled else None

    def run(room, wide):
        params, *others = ([wide(t.clone()) for t in group] for group in start)
        grads, m, v = others[0], others[1], [t.square() for t in others[2]]
        copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
        for step in (1, 2, 3):
            room.adamw(
                params, grads, m, v, step, lr=rates, weight_decay=decays, betas=(0.8, 0.9),
                grad_scale=factor, copies=copies,
            )  # fmt: skip
        assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies, params, strict=True))
        return [*params, *m, *v]

    no_worse(
        run(EAGER, lambda t: t), run(REFERENCE, lambda t: t), run(REFERENCE, torch.Tensor.double)
    )


def test_uniform():
    """Equal to the reference bit for bit, whatever the seed."""
    rows, made = torch.tensor([0, 1, 5, 2**40]), torch.tensor([3, 0, 7, 2**33])
    for seed in (0, 1337, 2**63, 2**64 - 1, 2**64 + 3, -5):
        assert torch.equal(EAGER.uniform(seed, rows, made), REFERENCE.uniform(seed, rows, made))


DECODES = {
    "plain": {},
    "scale": {"scale": 0.7},
    "window": {"window": 5},
    "window 1": {"window": 1},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi and window": {"alibi_slopes": SLOPES, "window": 5},
}


@pytest.mark.parametrize("lengths", [None, [63, 63], [63, 9], [4, 5]], ids=str)
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DECODES)
@torch.no_grad()
def test_decode_attention(generator, no_worse, name, dtype, T, lengths):
    options = DECODES[name]
    S = 63 if lengths is None else max(lengths)
    q = torch.randn(B, T, H, D, generator=generator).to(dtype)
    room = torch.randn(2, B, S + 5, G, D, generator=generator).to(dtype)  # as a cache hands it out
    k, v = room[0, :, :S], room[1, :, :S]
    ends = None if lengths is None else torch.tensor(lengths)
    truth = REFERENCE.decode_attention(q.double(), k.double(), v.double(), ends, **widened(options))
    ours = EAGER.decode_attention(q, k, v, ends, **options)
    yardstick = REFERENCE.decode_attention(q, k, v, ends, **options)
    no_worse([ours], [yardstick], [truth])


def test_attention_takes_an_empty_batch():
    q = torch.zeros(0, 3, H, D)
    assert EAGER.attention(q, q, q).shape == REFERENCE.attention(q, q, q).shape == (0, 3, H, D)


def test_dropout_is_on_the_probabilities():
    x = torch.ones(1, 16, 2, 4, requires_grad=True)
    torch.manual_seed(1)
    y = EAGER.attention(x, x, x, dropout=0.5)
    # Query i keeps n of i + 1 equal probabilities, each doubled: 2 n / (i + 1).
    counts = y[0, :, 0, 0] * torch.arange(1, 17) / 2
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-5)
    assert len(set(counts.round().tolist())) > 4
    assert EAGER.attention(x, x, x).allclose(x)


HEADS = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "z-loss": {"z_loss": 0.3},
    "both": {"softcap": 1.5, "z_loss": 0.3},
    "index 2 ignored": {"ignore_index": 2},
    "index beyond the vocabulary ignored": {"ignore_index": 1000},
}
N, V = 11, 13


def head_inputs(generator, dtype=torch.float64, w_dtype=None, ignored=-100, contiguous=True):
    x = draw(generator, (N, C), dtype, contiguous)
    w = draw(generator, (V, C), w_dtype or dtype, contiguous)
    targets = torch.randint(V, (N,), generator=generator)
    targets[::4] = ignored
    return {"x": x, "w": w}, targets


def chunks_of(monkeypatch, rows):
    monkeypatch.setattr(eager_loss, "CHUNK", rows * V + V - 1)
    monkeypatch.setattr(eager_loss, "ROWS", 1)


@pytest.mark.parametrize("rows", [1, 2, 5, N - 1, N, 100])
@pytest.mark.parametrize("name", HEADS)
def test_linear_cross_entropy_in_chunks(monkeypatch, generator, name, rows):
    chunks_of(monkeypatch, rows)
    options = HEADS[name]
    inputs, targets = head_inputs(generator, ignored=options.get("ignore_index", -100))
    options = {**options, "targets": targets}
    weights = [torch.tensor(0.7)]
    truth = outputs_and_gradients(REFERENCE.linear_cross_entropy, inputs, options, weights)
    ours = outputs_and_gradients(EAGER.linear_cross_entropy, inputs, options, weights)
    for y, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        y = EAGER.linear_cross_entropy(**inputs, **options)
    torch.testing.assert_close(y, truth[0], rtol=1e-12, atol=1e-12)


@broad("name", HEADS)
def test_linear_cross_entropy_gradcheck(monkeypatch, generator, name):
    chunks_of(monkeypatch, 4)
    options = HEADS[name]
    inputs, targets = head_inputs(generator, ignored=options.get("ignore_index", -100))
    x, w = (t.requires_grad_() for t in inputs.values())
    head = EAGER.linear_cross_entropy
    assert torch.autograd.gradcheck(lambda x, w: head(x, w, targets, **options), (x, w))


def plain_head(x, w, targets, softcap=0.0, z_loss=0.0, ignore_index=-100):
    """What one writes first: the products in x's dtype, the loss of all logits in fp32."""
    z = F.linear(x, w.to(x.dtype)).float()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    loss = F.cross_entropy(z, targets, ignore_index=ignore_index)
    if z_loss:
        loss = loss + z_loss * z[targets != ignore_index].logsumexp(-1).square().mean()
    return loss


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", HEADS)
def test_linear_cross_entropy_in_low_precision(
    monkeypatch, generator, no_worse, name, dtypes, contiguous
):
    chunks_of(monkeypatch, 4)
    ignored = HEADS[name].get("ignore_index", -100)
    inputs, targets = head_inputs(generator, *dtypes, ignored, contiguous)
    options = {**HEADS[name], "targets": targets}
    weights = [torch.tensor(0.7)]
    truth = outputs_and_gradients(REFERENCE.linear_cross_entropy, widened(inputs), options, weights)
    yardstick = outputs_and_gradients(plain_head, inputs, options, weights)
    ours = outputs_and_gradients(EAGER.linear_cross_entropy, inputs, options, weights)
    assert [y.dtype for y in ours] == [torch.float32, *dtypes]
    no_worse(ours, yardstick, truth)


def test_linear_cross_entropy_when_no_row_counts(generator):
    inputs, targets = head_inputs(generator)
    targets[:] = -100
    for op in (REFERENCE.linear_cross_entropy, EAGER.linear_cross_entropy):
        assert op(**inputs, targets=targets).isnan()


@pytest.mark.parametrize("target", [-5, V])
def test_linear_cross_entropy_refuses_targets_outside_the_vocabulary(generator, target):
    inputs, targets = head_inputs(generator)
    targets[3] = target
    with pytest.raises((IndexError, RuntimeError)):
        EAGER.linear_cross_entropy(**inputs, targets=targets)


def test_linear_cross_entropy_refuses_second_derivatives(generator):
    inputs, targets = head_inputs(generator)
    x, w = (t.requires_grad_() for t in inputs.values())
    loss = EAGER.linear_cross_entropy(x, w, targets).square()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd formula|does not require grad"):
        dx.sum().backward()


def test_linear_cross_entropy_leaves_its_gradients_alone(generator):
    inputs, targets = head_inputs(generator)
    x, w = (t.requires_grad_() for t in inputs.values())
    loss = EAGER.linear_cross_entropy(x, w, targets)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    twice = torch.autograd.grad(2 * loss, (x, w))
    for a, b in zip(first, twice, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (2, 3, 8, 5), (1, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_newton_schulz(generator, no_worse, dtype, shape):
    g = torch.randn(shape, generator=generator).to(dtype)
    truth = REFERENCE.newton_schulz(g.double())
    no_worse([EAGER.newton_schulz(g)], [REFERENCE.newton_schulz(g)], [truth])


@pytest.mark.parametrize("shape", [(32, 48), (3, 48, 32)], ids=str)
def test_newton_schulz_in_bf16_still_points_the_same_way(generator, shape):
    g = torch.randn(shape, generator=generator)
    y = EAGER.newton_schulz(g.bfloat16())
    assert y.dtype == torch.bfloat16
    y, truth = y.float(), REFERENCE.newton_schulz(g)
    cosine = (y * truth).sum() / (y.norm() * truth.norm())
    assert cosine > 0.99
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.6 and values.max() < 1.3


def test_newton_schulz_of_nothing_is_nothing():
    zero = torch.zeros(2, 3, 4)
    assert EAGER.newton_schulz(zero).equal(zero)


def test_sample_is_the_reference():
    assert EAGER.sample is REFERENCE.sample


# The peak only ever rises, so the thrifty way comes first; numbers in MiB, after a small warm-up.
MEASURE = """
import torch
import torch.nn.functional as F
from minillm.ops import EAGER
from minillm.runtime.device import peak_memory
torch.set_num_threads(1)

def peak():
    return peak_memory(torch.device("cpu")) / 2**20

def run(head, N, C, V):
    x, w = torch.ones(N, C, requires_grad=True), torch.ones(V, C, requires_grad=True)
    before = peak()
    head(x, w, torch.arange(N)).backward()
    return peak() - before

plain = lambda x, w, targets: F.cross_entropy(F.linear(x, w), targets)
for head in (EAGER.linear_cross_entropy, plain):
    run(head, 64, 64, 64)
for head in (EAGER.linear_cross_entropy, plain):
    print(run(head, N=2048, C=384, V=50304))
"""


@pytest.mark.slow
def test_the_head_needs_a_quarter_of_the_memory():
    """N = 2048 rows, C = 384, V = 50304: forward and backward, in a process of its own."""
    pytest.importorskip("resource")
    result = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    ours, plain = map(float, result.stdout.split())
    assert plain > 2 * 2048 * 50304 * 4 / 2**20  # logits and their gradient at least
    assert ours <= plain / 4, f"{ours:.0f} MiB against {plain:.0f} MiB"
