"""The Triton rotary embedding answers to the reference: with and without norm, and into a cache."""

import pytest
import torch
from hypothesis import strategies as st

from minillm.kernels import _rope_kernels, rope as room, rope_cache
from minillm.kernels.rope import rope
from minillm.ops import REFERENCE
from tests.support.broad import broad, searched

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(device, dtype=torch.float32, B=2, T=37, H=6, G=2, D=32, norm=True):
    """q, k as slices of one tensor, weights; and the angles of T positions."""
    numbers = torch.Generator().manual_seed(0)
    heads = torch.randn(B, T, H + 2 * G, D, generator=numbers).to(device, dtype)
    q, k, _ = heads.split((H, G, G), dim=2)
    weights = (0.5 + torch.rand(2, D, generator=numbers)).to(device)
    named = {"q_weight": weights[0], "k_weight": weights[1]} if norm else {}
    return {"q": q, "k": k, **named}, angles(device, T, D)


def angles(device, T, D):
    turn = torch.arange(T)[:, None] * 1e4 ** (-torch.arange(0, D, 2) / D)
    return {"cos": turn.cos().to(device), "sin": turn.sin().to(device)}


@searched(2, 12,
    B=st.integers(1, 3), T=st.integers(1, 50), H=st.integers(1, 9), G=st.integers(1, 5),
    half=st.integers(2, 128), norm=st.booleans(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_values_and_gradients(check, device, B, T, H, G, half, norm, dtype):
    """Heads of 2 are left out: once normalised they hardly have a gradient but rounding's."""
    given_, turned = inputs(device, dtype, B, T, H, G, 2 * half, norm)
    check(rope, given_, **turned, eps=1e-5)


@broad("dtype", DTYPES, quick=(0, 2), ids=str)
@broad("D", [32, 64, 96, 128])
def test_head_widths(check, device, dtype, D):
    for norm in (False, True):
        given_, turned = inputs(device, dtype, D=D, norm=norm)
        check(rope, given_, **turned)


def test_strides_and_angles(check, device):
    """Heads before time, time in steps, rows of a batch with angles of their own, in bf16; sines
    that lie in memory otherwise than cosines; weights with gaps."""
    given_, turned = inputs(device, T=13)
    q, k = given_["q"], given_["k"]
    other = {n: x.flip(0).bfloat16() for n, x in turned.items()}
    each = {n: torch.stack((turned[n].bfloat16(), other[n])) for n in turned}
    check(rope, {**given_, "q": q.transpose(1, 2).contiguous().transpose(1, 2)}, **each)
    check(rope, {**given_, "k": k.transpose(2, 3).contiguous().transpose(2, 3)}, **turned)
    check(rope, given_, **{**turned, "sin": turned["sin"].t().contiguous().t()})
    gaps = {n: torch.stack((given_[n], given_[n] + 1), 1)[:, 0] for n in ("q_weight", "k_weight")}
    check(rope, {**given_, **gaps}, **turned)
    half = {n: x[::2] for n, x in turned.items()}
    check(rope, {**given_, "q": q[:, ::2], "k": k[:, ::2]}, **half)
    check(rope, given_, **{n: x.repeat(2, 1, 1).transpose(1, 2).contiguous().transpose(1, 2)
                           for n, x in turned.items()})  # fmt: skip


def test_gradient_of_one_result(device):
    """Nothing reaches k': dk and its weight's gradient are zero."""
    given_, turned = inputs(device)
    leaves = {n: x.clone().requires_grad_() for n, x in given_.items()}
    rope(**leaves, **turned)[0].sum().backward()
    assert not leaves["k"].grad.any() and not leaves["k_weight"].grad.any()
    assert leaves["q"].grad.any() and leaves["q_weight"].grad.any()


def test_empty(device):
    given_, turned = inputs(device, T=0)
    leaves = {n: x.clone().requires_grad_() for n, x in given_.items()}
    q, k = rope(**leaves, **turned)
    (q.sum() + k.sum()).backward()
    assert q.shape == (2, 0, 6, 32) and k.shape == (2, 0, 2, 32)
    assert not leaves["q_weight"].grad.any()


def test_launches_and_repeats(device, launches):
    """One launch forward for q and k, one backward; twice the same bits."""

    def run():
        given_, turned = inputs(device, torch.bfloat16, T=20)
        leaves = {n: x.detach().requires_grad_() for n, x in given_.items()}
        y = rope(**leaves, **turned)
        return *y, *torch.autograd.grad([t.square().sum() for t in y], list(leaves.values()))

    first, second = run(), run()
    assert launches == {"_rope_fwd_kernel": 2, "_rope_bwd_kernel": 2}
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def decoding(device, dtype=torch.float32, cache_dtype=None, T=3, norm=True):
    """Arguments of rope_cache: slices, and a cache that is a part of a larger one, half full."""
    given_, _ = inputs(device, dtype, T=T, norm=norm)
    numbers = torch.Generator().manual_seed(1)
    v = torch.randn(2, T, 2, 32, generator=numbers).to(device, dtype)
    held = torch.randn(2, 3, 2, 40, 2, 32, generator=numbers).to(device, cache_dtype or dtype)
    return {**given_, "v": v, **angles(device, 50, 32)}, held[0, 1, :, :20], held[1, 1, :, :20]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", [5, [0, 17]], ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_into_a_cache(compare, device, launches, dtype, positions, norm):
    """Values as by the rule, all of the cache elsewhere as it was, in one launch."""
    given_, cache_k, cache_v = decoding(device, dtype, norm=norm)
    where = torch.tensor(positions, device=device) if isinstance(positions, list) else positions
    found = []
    for op, wide in ((rope_cache.rope_cache, False), (REFERENCE.rope_cache, False),
                     (REFERENCE.rope_cache, True)):  # fmt: skip
        to = (lambda x: x.double()) if wide else (lambda x: x.clone())
        caches = {"cache_k": to(cache_k), "cache_v": to(cache_v)}
        with torch.no_grad():
            q = op(**{n: to(x) for n, x in given_.items()}, **caches, positions=where)
        found.append([q, *caches.values()])
    compare(*found)
    untouched = torch.ones(2, 20, dtype=torch.bool)
    for b, p in enumerate(positions if isinstance(positions, list) else [positions] * 2):
        untouched[b, p : p + 3] = False
    for ours, before in zip(found[0][1:], (cache_k, cache_v), strict=True):
        assert torch.equal(ours[untouched], before[untouched])
    assert launches == {"_rope_fwd_kernel": 1}


def test_strides_into_a_cache(device):
    """Sines that lie in memory otherwise than cosines, weights with gaps: the same bits."""
    given_, cache_k, cache_v = decoding(device)
    gaps = {n: torch.stack((given_[n], given_[n] + 1), 1)[:, 0] for n in ("q_weight", "k_weight")}
    found = []
    for change in ({}, {"sin": given_["sin"].t().contiguous().t(), **gaps}):
        caches = {"cache_k": cache_k.clone(), "cache_v": cache_v.clone()}
        q = rope_cache.rope_cache(**{**given_, **change}, **caches, positions=4)
        found.append([q, *caches.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_cache_of_another_dtype(device):
    given_, cache_k, cache_v = decoding(device, torch.float32, torch.bfloat16)
    caches = {"cache_k": cache_k.clone(), "cache_v": cache_v.clone()}
    theirs = {name: x.clone() for name, x in caches.items()}
    q = rope_cache.rope_cache(**given_, **caches, positions=4)
    assert q.dtype == torch.float32
    REFERENCE.rope_cache(**given_, **theirs, positions=4)
    for name, cache in caches.items():  # the last bit may round the other way
        torch.testing.assert_close(cache, theirs[name], rtol=2**-7, atol=0)


@broad(
    ("old", "new"),
    [
        ("y1 = x1 * cos - x2 * sin", "y1 = x1 * cos + x2 * sin"),
        ("x2 *= rstd * w2", "x2 *= rstd * w1"),
        ("dx2 = dy2 * cos - dy1 * sin", "dx2 = dy2 * cos + dy1 * sin"),
        ("dx1 = (dx1 - x1 * mean) * rstd", "dx1 = dx1 * rstd"),
        ("dw2 += tl.sum(dx2 * x2, 0, keep_dims=True)", "dw2 = tl.sum(dx2 * x2, 0, keep_dims=True)"),
        ("is_q = group < groups", "is_q = group <= groups"),
    ],
    quick=(0, 2),
)
def test_a_broken_copy_is_seen(broken, check, device, monkeypatch, old, new):
    copy = broken(_rope_kernels, old, new)
    for name in ("_rope_fwd_kernel", "_rope_bwd_kernel"):
        monkeypatch.setattr(room, name, getattr(copy, name))
    given_, turned = inputs(device)
    with pytest.raises(AssertionError):
        check(rope, given_, **turned)


@broad(
    ("old", "new"),
    [
        ("at += first_position", "at += 0"),
        ("at += tl.load(positions_ptr + b,", "at += tl.load(positions_ptr + b * 0,"),
        ("& (at >= 0) & (at < S)", "& (at >= 0) & (at < S - 18)"),
        ("_store_halves(v_out_ptr, v1, v2, v_rows", "_store_halves(v_out_ptr, v2, v1, v_rows"),
        ("v_rows = b * v_stride_b + t * v_stride_t", "v_rows = b * v_stride_b + at * v_stride_t"),
        ("+ at * v_out_stride_t", "+ t * v_out_stride_t"),
    ],
    quick=(0, 3),
)
def test_a_broken_copy_is_seen_in_the_cache(broken, device, monkeypatch, old, new):
    copy = broken(_rope_kernels, old, new)
    monkeypatch.setattr(rope_cache, "_rope_fwd_kernel", copy._rope_fwd_kernel)
    given_, cache_k, cache_v = decoding(device)
    wrong = 0
    for positions in (5, torch.tensor([0, 2], device=device)):
        found = []
        for op in (rope_cache.rope_cache, REFERENCE.rope_cache):
            caches = {"cache_k": cache_k.clone(), "cache_v": cache_v.clone()}
            found.append([op(**given_, **caches, positions=positions), *caches.values()])
        wrong += any(not torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))
    assert wrong


@pytest.mark.slow
def test_opcheck(device):
    given_, turned = inputs(device, B=1, T=5, H=2, G=1, D=16)
    leaves = {n: x.clone().requires_grad_() for n, x in given_.items()}
    q, k, weights = leaves["q"], leaves["k"], (leaves["q_weight"], leaves["k_weight"])
    torch.library.opcheck(room._rope, (q, k, *turned.values(), *weights, 1e-6))
    torch.library.opcheck(room._rope, (q, k, *turned.values(), None, None, 1e-6))
    dy = [torch.ones_like(x.detach()) for x in (q, k)]
    rows = [x.detach() for x in (q, k)]
    for some in ((*rows, *turned.values(), *(w.detach() for w in weights)),
                 (None, None, *turned.values(), None, None)):  # fmt: skip
        torch.library.opcheck(room._rope_bwd, (*dy, *some, 1e-6))
    more, cache_k, cache_v = decoding(device)
    order = ("q", "k", "v", "cos", "sin")
    arguments = (*(more[n].clone() for n in order), cache_k.clone(), cache_v.clone())
    torch.library.opcheck(rope_cache._rope_cache, (*arguments, None, 3, None, None, 1e-6))
    torch.library.opcheck(
        rope_cache._rope_cache, (*arguments, torch.tensor([1, 9], device=device), 0,
                                 more["q_weight"], more["k_weight"], 1e-6),
    )  # fmt: skip


def test_compiles_as_one_graph(device):
    given_, turned = inputs(device)
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    ours, plain = compiled(**given_, **turned), rope(**given_, **turned)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 37, 6, 31)}, "q: .*D even"),
        ({"k": (2, 36, 2, 32)}, r"k: shape \(2, 36, 2, 32\), expected \(2, 37, G, 32\)"),
        ({"cos": (36, 16), "sin": (36, 16)}, r"cos: .*expected \(37, 16\) or \(2, 37, 16\)"),
        ({"sin": (37, 15)}, "sin: .*expected cos's"),
        ({"q_weight": (16,)}, "q_weight: "),
        ({"k_weight": None}, "one is None, expected both or neither"),
    ],
    ids=str,
)
def test_wrong_arguments(device, change, message):
    given_, turned = inputs(device)
    new = {n: s if s is None else torch.ones(s, device=device) for n, s in change.items()}
    with pytest.raises(ValueError, match=message):
        rope(**{**given_, **turned, **new})


def test_wrong_positions(device):
    given_, cache_k, cache_v = decoding(device)
    for positions, message in (
        (18, "expected 0 to 17"),
        (torch.zeros(3, dtype=torch.int64), r"expected \(2,\)"),
        (torch.zeros(2), "torch.float32, expected .* of int32 or int64"),
    ):
        with pytest.raises(ValueError, match=f"positions: .*{message}"):
            rope_cache.rope_cache(**given_, cache_k=cache_k, cache_v=cache_v, positions=positions)


def test_a_position_beyond_the_cache_writes_nothing(device):
    """The second row stands at the end: of its three tokens one is written."""
    given_, cache_k, cache_v = decoding(device)
    caches = {"cache_k": cache_k.clone(), "cache_v": cache_v.clone()}
    rope_cache.rope_cache(**given_, **caches, positions=torch.tensor([-2, 19], device=device))
    for cache, before in zip(caches.values(), (cache_k, cache_v), strict=True):
        changed = (cache != before).any(-1).any(-1).nonzero().tolist()
        assert changed == [[0, 0], [1, 19]]


def test_what_is_saved(device):
    """Without a norm not q and k, which would be kept for nothing."""
    for norm in (False, True):
        given_, turned = inputs(device, norm=norm)
        leaves = {n: x.detach().requires_grad_() for n, x in given_.items()}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
            rope(**leaves, **turned)
        assert any(x.shape == leaves["q"].shape for x in saved) == norm
