"""The Triton attention answers to the reference: any length, head width, mask and layout."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from minillm.kernels import (
    _attention_backward,
    _attention_blocks,
    _attention_forward,
    _launch,
    attention as room,
)
from minillm.kernels.attention import attention
from tests.support.broad import broad

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MASKS = ("window", "documents", "softcap", "alibi_slopes")
KERNELS = [f"_attention_{n}_kernel" for n in ("fwd", "delta_bwd", "dkdv_bwd", "dq_bwd")]


def inputs(device, dtype=torch.bfloat16, B=1, T=203, H=2, G=1, D=64):
    numbers = torch.Generator().manual_seed(0)
    shapes = {"q": (B, T, H, D), "k": (B, T, G, D), "v": (B, T, G, D)}
    return {n: torch.randn(s, generator=numbers).to(device, dtype) for n, s in shapes.items()}


def masks(device, B, T, H, names=MASKS):
    """Options of these names; the first row has some four documents."""
    numbers = torch.Generator().manual_seed(1)
    starts = torch.rand(B, T, generator=numbers) < 3 / T
    starts[0, T // 2] = True
    every = {
        "window": max(1, T // 3),
        "documents": starts.cumsum(1).to(device),
        "softcap": 2.0,
        "alibi_slopes": torch.rand(H, generator=numbers).to(device),
    }
    return {name: every[name] for name in names}


@pytest.fixture
def small(monkeypatch, device):
    """Small blocks where kernels are interpreted: then short sequences have many, of each kind."""

    def shrunk(operation, kernel, size, variant=""):
        block = _launch.tile(operation, kernel, size, variant)
        if device.type == "cpu":
            T, S = (16, 32) if kernel == "dkdv" else (32, 16)
            block |= {"BLOCK_T": T, "BLOCK_S": S}
        return block

    monkeypatch.setattr(_attention_blocks, "tile", shrunk)


@pytest.fixture
def pointers(monkeypatch, device):
    """As on sm_80, without descriptors, and with its tiles where kernels are interpreted."""
    monkeypatch.setattr(_attention_blocks, "has_tma", lambda: False)
    if device.type == "cpu":
        monkeypatch.setattr(_launch, "arch", lambda: 80)


@pytest.mark.slow
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    B=st.integers(1, 2), T=st.integers(2, 120), G=st.integers(1, 2), share=st.integers(1, 2),
    D=st.integers(1, 128), dtype=st.sampled_from(DTYPES),
    names=st.lists(st.sampled_from(MASKS), unique=True), window=st.integers(2, 120),
)  # fmt: skip
def test_values_and_gradients(check, device, small, B, T, G, share, D, dtype, names, window):
    """Not T = 1 and windows of 1: dq and dk are then what rounding leaves of 0, without a scale."""
    options = masks(device, B, T, G * share, names)
    if "window" in options:
        options["window"] = window
    check(attention, inputs(device, dtype, B, T, G * share, G, D), **options)


@broad("D", [32, 64, 96, 128])
@broad("dtype", DTYPES, quick=(0, 2), ids=str)
def test_head_widths(check, device, dtype, D):
    """The tiles as they ship: without a mask, and with all of them."""
    T = 70 if dtype == torch.float32 else 203
    check(attention, inputs(device, dtype, T=T, D=D))
    check(attention, inputs(device, dtype, T=T, D=D), **masks(device, 1, T, 2))


@broad("D", [32, 64, 96, 128])
@broad("dtype", DTYPES[1:], quick=(1,), ids=str)
def test_pointers(check, device, pointers, dtype, D):
    """The tiles of sm_80, whose path is by pointers."""
    check(attention, inputs(device, dtype, T=131, D=D))
    check(attention, inputs(device, dtype, T=131, D=D), **masks(device, 1, 131, 2))


@pytest.mark.parametrize("name", MASKS)
@broad("D", [32, 64, 96, 128])
def test_each_mask(check, device, small, name, D):
    check(attention, inputs(device, T=101, D=D), **masks(device, 1, 101, 2, [name]))


@broad("split", [False, True], quick=(1,))
@broad(("H", "G"), [(4, 4), (6, 2), (3, 1)], quick=(1,))
def test_groups(check, device, monkeypatch, H, G, split):
    """MHA, GQA and MQA, with the blocks of dk and dv in one loop and in two."""

    def chosen(operation, kernel, *rest):
        change = {"BLOCK_S": 64, "SPLIT": split} if kernel == "dkdv" else {}
        return _launch.tile(operation, kernel, *rest) | change

    monkeypatch.setattr(_attention_blocks, "tile", chosen)
    x = inputs(device, T=300, H=H, G=G, D=32)
    check(attention, x, **masks(device, 1, 300, H, ["documents", "window"] if split else []))


@pytest.mark.parametrize("T", [2, 64, 127, 128, 129])
def test_lengths(check, device, T):
    """About the edges of blocks."""
    check(attention, inputs(device, T=T, D=32))


def test_scale(check, device, small):
    for scale, names in ((0.03, MASKS), (1.0, [])):
        check(attention, inputs(device, T=90), scale=scale, **masks(device, 1, 90, 2, names))


@broad("window", [17, 99, 2, 16, 100, 1 << 40], quick=2)
def test_windows(check, device, small, window):
    """Of less than a block, of a block's length, about the sequence's."""
    check(attention, inputs(device, T=100, H=1, D=32), window=window)


def test_one_key(device):
    """A window of one key, documents of one token, a sequence of one: a query sees only itself."""
    q, k, v = inputs(device, T=70, H=1).values()
    each = torch.arange(70, device=device)[None]
    for options in ({"window": 1}, {"documents": each}):
        assert torch.equal(attention(q, k, v, **options), v)
    assert torch.equal(attention(q[:, :1], k[:, :1], v[:, :1]), v[:, :1])


@pytest.mark.parametrize("options", [{"T": 1}, {"T": 70, "window": 1}], ids=str)
def test_gradients_of_one_key(device, options):
    """dv is dy; of dq and dk, which are 0, there is only what rounding leaves of a difference:

    dy.v - delta, two sums of 64 products in fp32, hence below 64 eps of their size, times k.
    """
    x = inputs(device, torch.float32, T=options["T"], H=1)
    leaves = {n: t.requires_grad_() for n, t in x.items()}
    y = attention(**leaves, window=options.get("window", 0))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(device)
    dq, dk, dv = torch.autograd.grad(y, list(leaves.values()), dy)
    torch.testing.assert_close(dv, dy, rtol=1e-5, atol=0)
    rounding = 64 * torch.finfo(torch.float32).eps * (dy * x["v"]).abs().sum(-1, keepdim=True)
    for gradient, other in ((dq, x["k"]), (dk, x["q"])):
        assert (gradient.abs() <= rounding * other.abs()).all()


@broad("dtype", DTYPES, quick=(2,), ids=str)
@broad("layout", ["fused", "head first", "reversed", "unaligned", "transposed"])
def test_strides(check, device, small, dtype, layout):
    """Slices of one tensor, other orders of dimensions, rows off 16 bytes, heads not contiguous."""
    numbers = torch.Generator().manual_seed(0)
    shape = {
        "fused": (2, 50, 8, 32), "head first": (2, 8, 50, 32), "reversed": (50, 2, 8, 32),
        "unaligned": (2, 50, 8, 35), "transposed": (2, 50, 32, 8),
    }[layout]  # fmt: skip
    x = torch.randn(shape, generator=numbers).to(device, dtype)
    swapped = {"head first": (1, 2), "reversed": (0, 1), "transposed": (2, 3)}.get(layout)
    x = x.transpose(*swapped) if swapped else x[..., -32:]
    q, k, v = x.split((4, 2, 2), 2)
    check(attention, {"q": q, "k": k, "v": v}, window=33)


@pytest.mark.parametrize("path", ["descriptors", "pointers"])
def test_offsets_beyond_int32(check, device, monkeypatch, path):
    """The second row of the batch starts 2^31 numbers behind the first; the rest is never read."""
    monkeypatch.setattr(_attention_blocks, "has_tma", lambda: path == "descriptors")
    far = (1 << 31) + 16
    memory = torch.UntypedStorage(2 * (far + 20 * 96), device=device)  # not filled: 4 GiB
    x = torch.tensor([], dtype=torch.bfloat16, device=device)
    x.set_(memory, 0, (2, 20, 3, 32), (far, 96, 32, 1))
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    q, k, v = x.unbind(2)
    check(attention, {n: t[:, :, None] for n, t in {"q": q, "k": k, "v": v}.items()})


@pytest.mark.parametrize(("B", "T"), [(0, 8), (2, 0)])
def test_empty(device, B, T, launches):
    """No row or no token: no launch, and empty gradients."""
    x = {n: t.requires_grad_() for n, t in inputs(device, B=B, T=T).items()}
    options = masks(device, 1, 8, 2)
    options["documents"] = torch.zeros(B, T, dtype=torch.int64, device=device)
    y = attention(**x, **options)
    grads = torch.autograd.grad(y.sum(), list(x.values()))
    assert [g.shape for g in (y, *grads)] == [x[n].shape for n in "qqkv"] and not launches


def test_launches_and_repeats(device, small, launches):
    """One launch forward, three backward; twice the same bits."""
    x = inputs(device, T=100, H=2, D=32)
    options = masks(device, 1, 100, 2)

    def run():
        leaves = {n: t.detach().requires_grad_() for n, t in x.items()}
        y = attention(**leaves, **options)
        return y, *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))

    first, second = run(), run()
    assert launches == dict.fromkeys(KERNELS, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_unseen_blocks_are_not_read(device, small):
    """Numbers that nobody sees may be NaN: a block of them would leave NaN, were it visited."""
    half = 64 if device.type == "cpu" else 128  # the blocks of a GPU are not small
    x = inputs(device, T=2 * half, H=1, D=32)
    documents = (torch.arange(2 * half, device=device) >= half).long()[None]
    late = slice(half * 3 // 2, None)
    for options in ({"window": 32}, {"documents": documents}):
        spoilt = {n: t.clone() for n, t in x.items()}
        for n in "kv":
            spoilt[n][:, : half // 2] = torch.nan
        y = attention(**spoilt, **options)[:, late]
        assert torch.equal(y, attention(**x, **options)[:, late])
        leaves = {n: t.requires_grad_() for n, t in spoilt.items()}
        y = attention(**leaves, **options)
        dy = torch.zeros_like(y)
        dy[:, late] = 1
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
        assert all(g[:, late].isfinite().all() for g in grads)


FORWARD = [
    ("s = hide(s, i, j, j,", "s = hide(s, j, j, j,"),  # no causal mask
    ("j, first[:, None],", "j, first[:, None] * 0,"),  # no first key
    ("s = tl.dot(qs", "s = -tl.dot(qs"),
    ("s = bias(s, slope", "s = bias(s, -slope"),
    ("s = cap * tanh(s / cap", "s = cap * tanh(s / cap + 0.1"),
    ("tl.range(lowest // BLOCK_S * BLOCK_S,", "tl.range((lowest // BLOCK_S + 1) * BLOCK_S,"),
    ("tl.minimum(row + BLOCK_T, T), BLOCK_S)", "tl.minimum(row + BLOCK_T, T) - BLOCK_S, BLOCK_S)"),
    ("k, b, h // SHARE, column", "k, b, h % (H // SHARE), column"),
    ("mass * fade", "mass"),
    ("| (column < highest)", ""),
]
BACKWARD = [
    ("p = hide(p, i, j, last[:, None]", "p = hide(p, j, j, last[:, None]"),
    ("p = hide(p, i, j, last[:, None], i,", "p = hide(p, i, j, i, i,"),
    ("p = hide(p, i, j, j, first", "p = hide(p, j, j, j, first"),
    ("p = hide(p, i, j, j, first[:, None]", "p = hide(p, i, j, j, first[:, None] * 0"),
    ("deltas[None, :])", "deltas[None, :] * -1)"),
    ("- delta[:, None])", "+ delta[:, None])"),
    ("left + n - h * middle", "left + n"),
    ("n - h * edges", "n"),
    ("b, g * SHARE + h, row,\n            q", "b, g * SHARE, row,\n            q"),
    ("total = tl.cdiv(end - first, BLOCK_T)", "total = tl.cdiv(end - first, BLOCK_T) - 1"),
    ("end = tl.minimum(end, column + BLOCK_S - 1 + window)", "end = tl.minimum(end, column + 16)"),
    ("(full - first) // BLOCK_T, total)", "(full - first) // BLOCK_T + 1, total)"),
    ("dk * scale", "dk"),
    ("dq * scale", "dq"),
    ('other=float("inf")', "other=0.0"),
]


@broad(
    ("module", "old", "new"),
    [(_attention_forward, *case) for case in FORWARD]
    + [(_attention_backward, *case) for case in BACKWARD],
    quick=(1, 10),
)
def test_a_broken_copy_is_seen(
    broken, check, device, small, pointers, monkeypatch, module, old, new
):
    """By pointers: descriptors give zeros for rows beyond T, which forgive a wrong lse there."""
    copy = broken(module, old, new)
    pass_ = "forward" if module is _attention_forward else "backward"
    monkeypatch.setattr(room, pass_, getattr(copy, pass_))
    with pytest.raises(AssertionError):
        x = inputs(device, T=101, H=4, G=2, D=32)
        check(attention, x, **masks(device, 1, 101, 4))
        check(attention, x, window=60)


def test_arguments_are_checked(device):
    q, k, v = inputs(device, T=5, H=4, G=2, D=16).values()
    wrong = [
        ("q", {"q": q[0]}),
        ("q", {"q": torch.zeros(1, 5, 4, 129)}),
        ("q", {"q": q.double()}),
        ("q", {"q": q[:, :1, :1].expand(1 << 16, 1 << 15, 1, 16)}),
        ("q", {"q": q[:, :1, :1].expand(1 << 14, 1, 1 << 10, 16)}),  # 2^24, but 2^31 padded
        ("q", {"q": q[:, :, :0]}),
        ("k", {"k": k.half()}),
        ("k", {"k": k.repeat(1, 1, 2, 1)[:, :, :3]}),
        ("v", {"v": v[:, :, :1]}),
        ("scale", {"scale": 0.0}),
        ("window", {"window": -1}),
        ("softcap", {"softcap": -1.0}),
        ("dropout", {"dropout": 0.1}),
        ("documents", {"documents": torch.zeros(1, 4, dtype=torch.int64)}),
        ("documents", {"documents": torch.zeros(1, 5)}),
        ("alibi_slopes", {"alibi_slopes": torch.zeros(2)}),
        ("alibi_slopes", {"alibi_slopes": torch.zeros(4, requires_grad=True)}),
    ]
    for name, change in wrong:
        with pytest.raises(ValueError, match=f"^{name}: "):
            attention(**{"q": q, "k": k, "v": v, **change})


@broad("kernel", ["fwd", "delta", "dkdv", "dq"])
def test_blocks_that_the_padding_does_not_hold_are_refused(device, monkeypatch, kernel):
    """As --tune may try: of 300 tokens lse and delta are padded to 384, no multiple of 256."""

    def doubled(operation, name, *rest):
        found = _launch.tile(operation, name, *rest)
        return {**found, "BLOCK_T": 256} if name == kernel else found

    monkeypatch.setattr(_attention_blocks, "tile", doubled)
    x = {n: t.requires_grad_() for n, t in inputs(device, T=300).items()}
    with pytest.raises(ValueError, match=f"attention {kernel}: BLOCK_T 256 does not divide 128"):
        attention(**x).sum().backward()


@pytest.mark.slow
def test_opcheck(device):
    q, k, v = (x.requires_grad_() for x in inputs(device, torch.float32, T=9, D=16).values())
    starts = torch.tensor([[0, 0, 2, 2, 2, 2, 2, 2, 2]], dtype=torch.int32, device=device)
    slopes = torch.tensor([0.5, 0.25], device=device)
    numbers = (0.3, 4, 2.0)
    torch.library.opcheck(room._attention, (q, k, v, starts, slopes, *numbers))
    y, lse = room._attention(q, k, v, starts, slopes, *numbers)
    saved = [x.detach() for x in (q, k, v, y, lse, y)]
    torch.library.opcheck(room._attention_bwd, (*saved, starts, slopes, *numbers))


def test_compile(device, small):
    """torch.compile takes the operation whole, and the numbers stay equal bit for bit."""
    options = masks(device, 1, 20, 2)
    x, results = [t.requires_grad_() for t in inputs(device, T=20, D=16).values()], []
    for op in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        y = op(*x, **options)
        results.append([y, *torch.autograd.grad(y.float().sum(), x)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
