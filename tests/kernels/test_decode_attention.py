"""The Triton attention over a cache answers to the reference, however the keys are split."""

from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from minillm.kernels import _launch, decode_attention as room
from minillm.kernels.decode_attention import decode_attention
from minillm.ops import REFERENCE
from tests.support.broad import broad, searched

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SPLIT, COMBINE = "_decode_attention_kernel", "_decode_attention_combine_kernel"
FEATURES = ("window", "softcap", "alibi_slopes", "scale")


@pytest.fixture
def compare(request):
    """The rule of tolerance, on three lists of results: check() would have it take gradients."""
    conftest = str(Path(__file__).with_name("conftest.py"))
    return request.config.pluginmanager.get_plugin(conftest).compare


def inputs(device, dtype, B=2, T=1, S=150, H=4, G=2, D=32, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    shapes = (B, T, H, D), (B, S, G, D), (B, S, G, D)
    return [torch.randn(s, generator=numbers).to(device, dtype) for s in shapes]


def ragged(B, T, S, device, seed=0):
    """Lengths from T to S, the longest and the shortest among them where B allows."""
    numbers = torch.Generator().manual_seed(seed)
    lengths = torch.randint(T, S + 1, (B,), generator=numbers)
    lengths[0], lengths[-1] = T, S
    return lengths.to(device)


def options(names, H, device):
    values = {
        "window": 23, "softcap": 1.5, "alibi_slopes": torch.linspace(0.5, 0.01, H).to(device),
        "scale": 0.3,
    }  # fmt: skip
    return {name: values[name] for name in names}


def check(compare, q, k, v, lengths=None, op=decode_attention, **others):
    """op's values against the reference's, by the rule of tolerance."""
    double = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in others.items()}
    wide = (x.double() for x in (q, k, v))
    compare(
        [op(q, k, v, lengths, **others)],
        [REFERENCE.decode_attention(q, k, v, lengths, **others)],
        [REFERENCE.decode_attention(*wide, lengths, **double)],
    )


@searched(5, 16,
    B=st.integers(1, 3), T=st.integers(1, 5), more=st.integers(0, 300), G=st.integers(1, 2),
    share=st.integers(1, 4), D=st.integers(1, 128), dtype=st.sampled_from(DTYPES),
    is_ragged=st.booleans(), names=st.sets(st.sampled_from(FEATURES)), seed=st.integers(0, 99),
)  # fmt: skip
def test_values(compare, device, B, T, more, G, share, D, dtype, is_ragged, names, seed):
    S, H = T + more, G * share
    q, k, v = inputs(device, dtype, B, T, S, H, G, D, seed)
    lengths = ragged(B, T, S, device, seed) if is_ragged else None
    check(compare, q, k, v, lengths, **options(names, H, device))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_row_of_the_tables(compare, device, monkeypatch, dtype, arch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(_launch, "arch", lambda: arch)
    for D in (32, 64, 96, 128):
        q, k, v = inputs(device, dtype, 2, 1, 272, 8, 2, D)
        check(compare, q, k, v, ragged(2, 1, 272, device))
    q, k, v = inputs(device, dtype, 1, 9, 80, 4, 1, 128)
    check(compare, q, k, v)


@pytest.mark.parametrize("names", [(), ("window", "alibi_slopes")])
@broad("dtype", DTYPES, ids=str)
def test_many_queries(compare, device, dtype, names):
    """Several blocks of queries, the last with rows to spare; a head's rows across two blocks."""
    q, k, v = inputs(device, dtype, 2, 23, 70, 3, 1, 24)
    check(compare, q, k, v, ragged(2, 23, 70, device), **options(names, 3, device))


@broad("dtype", DTYPES, ids=str)
def test_a_view_of_a_bigger_cache(compare, device, dtype):
    """A layer and the first entries of all, as KVCache hands them out; q out of a fused product."""
    numbers = torch.Generator().manual_seed(1)
    cache = torch.randn(2, 3, 2, 300, 2, 48, generator=numbers).to(device, dtype)
    k, v = cache[0, 1, :, :200], cache[1, 1, :, :200]
    q = torch.randn(2, 3, 8, 48, generator=numbers).to(device, dtype)[:, :, :4]
    check(compare, q, k, v)
    check(compare, q, k, v, ragged(2, 3, 200, device))
    check(compare, q[..., ::2], k[..., ::2], v[..., ::2])


def test_what_lies_beyond_the_length_is_not_read(compare, device):
    q, k, v = inputs(device, torch.float32, 3, 2, 200)
    lengths = torch.tensor([2, 65, 130], device=device)
    clean = REFERENCE.decode_attention(q, k, v, lengths)
    beyond = torch.arange(200, device=device) >= lengths[:, None]
    for x in (k, v):
        x[beyond] = torch.nan
    y = decode_attention(q, k, v, lengths.int())
    compare([y], [clean], [clean.double()])


@pytest.mark.parametrize("S", [70, 0])
def test_padding_is_zero(device, S):
    """A query that stands before its row's first entry; all keys unwritten."""
    q, k, v = inputs(device, torch.float32, 2, 4, S)
    if S:
        k[1], v[1] = torch.nan, torch.nan
    lengths = torch.tensor([min(2, S), 0], device=device)
    y = decode_attention(q, k, v, lengths)
    if S:
        late = REFERENCE.decode_attention(q[:1, 2:], k[:1], v[:1], lengths[:1])
        torch.testing.assert_close(y[:1, 2:], late)
    assert not y[0, : 2 if S else 4].any() and not y[1].any()


@pytest.mark.parametrize("splits", [1, 2, 3, 33])
@pytest.mark.parametrize("names", [(), FEATURES])
def test_any_number_of_splits(compare, device, monkeypatch, splits, names):
    """Also more than there are blocks of keys: some find nothing."""
    monkeypatch.setattr(room, "_splits", lambda *_: splits)
    q, k, v = inputs(device, torch.float32, 2, 2, 300, 2, 1)
    check(compare, q, k, v, ragged(2, 2, 300, device), **options(names, 2, device))


def test_splits_follow_from_shapes(device):
    """Two programs a multiprocessor, none without a block of keys, never more than the table."""
    cpu = torch.device("cpu")
    assert [room._splits(p, 1 << 16, 64, cpu) for p in (1, 8, 100, 264, 999)] == [128, 33, 2, 1, 1]
    assert [room._splits(8, keys, 64, cpu) for keys in (0, 1, 64, 65, 640)] == [1, 1, 1, 2, 10]


def test_launches_and_repeats(device, launches):
    """Two launches, whatever the lengths are; one if there is nothing to split; the same bits."""
    q, k, v = inputs(device, torch.bfloat16, 2, 1, 300)
    first = decode_attention(q, k, v, torch.tensor([300, 300], device=device))
    assert launches == {SPLIT: 1, COMBINE: 1}
    decode_attention(q, k, v, torch.tensor([1, 3], device=device))
    assert launches == {SPLIT: 2, COMBINE: 2}
    assert torch.equal(first, decode_attention(q, k, v))
    decode_attention(q, k[:, :20], v[:, :20])
    assert launches == {SPLIT: 4, COMBINE: 3}
    assert decode_attention(q[:, :0], k, v).shape == (2, 0, 4, 32)
    assert decode_attention(q[:0], k[:0], v[:0]).shape == (0, 1, 4, 32)
    assert launches == {SPLIT: 4, COMBINE: 3}


@broad(
    ("old", "new"),
    [
        ("bottom + split * share", "bottom + split * (share + 1)"),
        ("seen = keys[None, :] <= last[:, None]", "seen = keys[None, :] <= end"),
        ("> queries[:, None] - window", "> queries[:, None] - window - 1"),
        ("y * fade[:, None]", "y"),
        ("heads = g * SHARE + rows % SHARE", "heads = g * SHARE + (rows + 1) % SHARE"),
        ("peak + tl.log2(mass)", "peak - tl.log2(mass)"),
        ("bias(s, slopes", "bias(s, -slopes"),
        ("parts * weight[:, None]", "parts"),
    ],
    quick=(0, 5),
)
def test_a_broken_copy_is_seen(broken, compare, device, old, new):
    copy = broken(room, old, new)
    copy._splits = lambda *_: 2  # so that each has more than one block of keys
    q, k, v = inputs(device, torch.float32, 2, 2, 300, 2, 1)
    lengths = ragged(2, 2, 300, device)
    options = {"window": 200, "alibi_slopes": torch.linspace(0.02, 0.01, 2).to(device)}
    with pytest.raises(AssertionError):
        check(compare, q, k, v, lengths, op=copy.decode_attention, **options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(1, 1, 4, 129)}, "q: "),
        ({"k": torch.zeros(1, 9, 3, 32)}, "k: .*divisor of 4"),
        ({"v": torch.zeros(1, 8, 2, 32)}, "v: "),
        ({"v": torch.zeros(1, 9, 2, 32).half()}, "v: torch.float16"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "lengths: "),
        ({"lengths": torch.zeros(1)}, "lengths: "),
        ({"scale": 0.0}, "scale: "),
        ({"window": -1}, "window: "),
        ({"softcap": -1.0}, "softcap: "),
        ({"alibi_slopes": torch.zeros(3)}, "alibi_slopes: "),
    ],
)
def test_wrong_arguments(changed, message):
    good = dict(zip("qkv", inputs("cpu", torch.float32, 1, 1, 9), strict=True))
    with pytest.raises(ValueError, match=f"^{message}"):
        decode_attention(**{**good, **changed})


def test_there_is_no_gradient(device):
    q, k, v = inputs(device, torch.float32)
    y = decode_attention(q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError, match="autograd"):
        y.sum().backward()


def test_opcheck_and_compile(device):
    q, k, v = inputs(device, torch.float32, S=30, H=2, G=1, D=16)
    slopes, lengths = torch.ones(2, device=device), torch.tensor([9, 30], device=device)
    for some in ((None, None), (lengths, slopes)):
        torch.library.opcheck(room._decode_attention, (q, k, v, *some, 0.2, 40, 3.0))
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, lengths), decode_attention(q, k, v, lengths))
