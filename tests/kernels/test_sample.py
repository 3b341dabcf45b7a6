"""The Triton sampler draws what the reference draws.

Two rules. Generic draws are the reference's, token by token. Where a number may stand on a border
between two tokens, and rounding decides, the token drawn must own an interval of the distribution
in float64 that contains the number within 1e-6.
"""

import math

import pytest
import torch
from hypothesis import strategies as st

from minillm.kernels import _launch, sample as room
from minillm.kernels.sample import sample, uniform
from minillm.ops import REFERENCE
from tests.support.broad import broad, searched

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAST = 1 - 2**-24  # the largest number that uniform makes
FILTERS = [
    {}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1},
    {"top_k": 12, "top_p": 0.8, "min_p": 0.02, "temperature": 0.7},
]  # fmt: skip


def draws(B, V, dtype, device, seed=0, spread=3.0):
    """Logits, and a number for each row."""
    numbers = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, V, generator=numbers) * spread
    return logits.to(device, dtype), torch.rand(B, generator=numbers).to(device)


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """(B, V) probabilities after the filters, in float64; by the largest first, not by a border."""
    logits = logits.double() / temperature
    p = (logits - logits.amax(-1, keepdim=True)).softmax(-1)
    if 0 < top_k < p.shape[-1]:
        p = p * (p >= p.topk(top_k).values[:, -1:])
        p = p / p.sum(-1, keepdim=True)
    ordered = p.sort(-1, descending=True).values
    for b, row in enumerate(ordered):
        kept = row[(row.cumsum(0) - row < top_p) | (row == row[0])]
        p[b] = p[b] * ((p[b] >= kept[-1]) & (p[b] >= min_p * row[0]))
    return p / p.sum(-1, keepdim=True)


def check_interval(tokens, logits, u, **options):
    """Each token's interval in float64 contains the row's number, within 1e-6."""
    p = distribution(logits, **options)
    own = p.gather(-1, tokens[:, None])[:, 0]
    upper = p.cumsum(-1).gather(-1, tokens[:, None])[:, 0]
    assert (own > 0).all()
    assert (upper > u.double() - 1e-6).all() and (upper - own < u.double() + 1e-6).all()


def check(logits, u, op=sample, **options):
    """Token by token the reference's."""
    tokens = op(logits, u, **options)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, REFERENCE.sample(logits, u, **options))
    return tokens


@searched(4, 16,
    V=st.integers(1, 1200), dtype=st.sampled_from(DTYPES), spread=st.sampled_from([0.1, 1.0, 8.0]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]), top_k=st.integers(0, 60),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]), min_p=st.sampled_from([0.0, 0.01, 0.3]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_draws(device, V, dtype, spread, temperature, top_k, top_p, min_p, seed):
    logits, u = draws(2, V, dtype, device, seed, spread)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    tokens = check(logits, u, **options)
    if temperature:
        check_interval(tokens, logits, u, **options)


@pytest.mark.parametrize("options", FILTERS, ids=str)
@broad("dtype", DTYPES, ids=str)
def test_every_token_that_is_kept(device, dtype, options):
    """A number from the middle of each interval draws its token: nothing is missing or too much."""
    logits = draws(1, 23, dtype, device)[0]
    p = distribution(logits, **options)[0]
    middles = (p.cumsum(0) - p / 2)[p > 0]
    tokens = check(logits.expand(len(middles), -1), middles, **options)
    assert torch.equal(tokens, p.nonzero()[:, 0])


@broad("V", [1024, 1025, 20011], quick=2)
def test_every_row_of_the_tables(device, monkeypatch, V):
    logits, u = draws(3, V, torch.float32, device, seed=V)
    for arch in (80, 90, 100):
        if not torch.cuda.is_available():
            monkeypatch.setattr(_launch, "arch", lambda arch=arch: arch)
        check_interval(sample(logits, u), logits, u)
    check_interval(sample(logits, u, **FILTERS[-1]), logits, u, **FILTERS[-1])
    check(logits, u, temperature=0.0)


@pytest.mark.slow
def test_the_largest_vocabulary(device):
    logits, u = draws(1, 262144, torch.bfloat16, device)
    options = {"top_k": 9000, "top_p": 0.9, "min_p": 1e-3}
    check_interval(sample(logits, u, **options), logits, u, **options)
    check_interval(sample(logits, u), logits, u)


@broad("u", [0.0, 0.4, LAST], quick=(2,))
@broad(
    "options",
    [{"top_k": 1}, {"top_k": 2}, {"top_k": 3}, {"top_p": 0.0}, {"top_p": 0.5}, {"min_p": 1.0},
     {"top_k": 2, "top_p": 0.6}, {"temperature": 1e-40}, {"temperature": 1e30, "top_k": 4},
     {"temperature": 0.0}], quick=(1, 4, 5, 6, 9),
    ids=str,
)  # fmt: skip
def test_ties(device, options, u):
    """What equals the border stays, as often as it is there; -0 equals 0."""
    rows = [[1.0, 2.0, 2.0, 2.0, -3.0], [0.0] * 5, [-1.0, -0.0, 0.0, -0.0, -9.0]]
    rows += [[-math.inf, 5.0, -math.inf, 5.0, -math.inf], [1.0, 0.0, 1.0, 0.0, 1.0]]
    check(torch.tensor(rows, device=device), torch.full((5,), u, device=device), **options)


def test_ties_by_rounding(device):
    """Logits that differ and do so no more after the division by the temperature are ties."""
    temperature, below = torch.tensor(1.5), torch.tensor(-1.99)
    while True:
        above, below = below, torch.nextafter(below, torch.tensor(-3.0))
        if above / temperature == below / temperature:
            break
    logits = torch.stack([torch.tensor(0.0), above, below, torch.tensor(-2.5)])[None].to(device)
    u = torch.tensor([LAST], device=device)
    assert check(logits, u, temperature=1.5, top_k=2).item() == 2
    assert check(logits, u, temperature=1.0, top_k=2).item() == 1


def test_weights_that_round_to_one_are_ties(device):
    """As probabilities of the reference do: logits of 1e-9 are as good as 0."""
    logits = torch.linspace(0, 1e-9, 7, device=device).repeat(2, 1)
    check(logits, torch.tensor([0.01, 0.99], device=device), top_p=0.3)


def test_what_is_barred_is_never_drawn(device):
    logits, _ = draws(2, 300, torch.float32, device)
    logits[:, torch.arange(300, device=device) % 100 != 7] = -math.inf
    for options in FILTERS:
        for u in (0.0, LAST):
            tokens = check(logits, torch.full((2,), u, device=device), **options)
            assert (tokens % 100 == 7).all()


@broad("dtype", DTYPES, ids=str)
def test_strides(device, dtype):
    """The true vocabulary of padded logits, every other row, a transposed tensor; numbers too."""
    logits, u = draws(4, 96, dtype, device)
    check(logits[:, :71], u, **FILTERS[-1])
    check(logits[::2, 5:], u[::2], **FILTERS[-1])
    check(logits.t()[:2], u[:1].expand(2), **FILTERS[-1])
    check(logits, u.double(), top_k=3)


def test_empty_and_single(device):
    logits, u = draws(3, 1, torch.float32, device)
    assert not check(logits, u).any() and not check(logits, u, top_k=1, top_p=0.1).any()
    assert sample(logits[:0], u[:0]).shape == (0,)
    assert uniform(1, u[:0].long(), u[:0].long()).shape == (0,)


@searched(
    15, 100,
    seed=st.integers(-(2**65), 2**65),
    words=st.lists(st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 2), min_size=1, max_size=9),
)  # fmt: skip
def test_uniform(device, seed, words):
    """The reference's bits; columns of a table are strided."""
    table = torch.tensor(words, dtype=torch.int64, device=device)
    u = uniform(seed, table[:, 0], table[:, 1])
    assert u.dtype == torch.float32
    assert torch.equal(u, REFERENCE.uniform(seed, table[:, 0], table[:, 1]))


def test_uniform_of_many_rows(device):
    rows = torch.arange(300, device=device)
    u = uniform(7, rows, rows.flip(0))
    assert torch.equal(u, REFERENCE.uniform(7, rows, rows.flip(0)))
    assert u.min() >= 0 and u.max() < 1 and 0.4 < u.mean() < 0.6


def test_launches_and_repeats(device, launches):
    """One launch for each, with whatever options; the same tokens again."""
    logits, u = draws(2, 500, torch.float32, device)
    for options in (*FILTERS, {"temperature": 0.0}):
        assert torch.equal(sample(logits, u, **options), sample(logits, u, **options))
    uniform(1, u.long(), u.long())
    assert launches == {"_sample_kernel": 12, "_uniform_kernel": 1}


@broad(
    ("old", "new"),
    [
        ("(x - peak) * factor", "(x + peak) * factor"),
        ("key >= three, weight", "key >= two, weight"),
        (">= wanted, one", ">= wanted, two"),
        ("2 * (PASSES - 1 - i)", "2 * (PASSES - i)"),
        ("ptr + columns, mask=columns < V", "ptr + columns, mask=columns < V - 1"),
        ("tl.minimum(least, tl.where(kept", "tl.maximum(least, tl.where(kept"),
        ("weight = tl.where(weight >= floor, weight, 0.0).to(tl.float64)",
         "weight = weight.to(tl.float64)"),
        ("(weight > 0) & (mass > target)", "(weight > 0) & (mass < target)"),
        ("before = after", "before = after * 0"),
        ("tl.maximum(floor, border)", "tl.minimum(floor, border)"),
        ("floor = tl.full([], min_p", "floor = tl.full([], top_p"),
    ], quick=(1, 7),
)  # fmt: skip
def test_a_broken_copy_is_seen(broken, device, old, new):
    copy = broken(room, old, new)
    copy.tile = lambda *_: {"BLOCK_V": 256, "num_warps": 4}
    logits, u = draws(2, 700, torch.float32, device)
    logits[:, -1] = logits.amax(-1) + 1  # so that it matters, and stands in the last block
    logits[:, 5:9] = logits[:, -1:] - 1
    u[0] = LAST
    with pytest.raises(AssertionError):
        for options in ({}, {"top_k": 6}, {"top_k": 2}, {"top_p": 0.35}, {"min_p": 0.4}):
            check(logits, u, op=copy.sample, **options)
            check(logits, 1 - u, op=copy.sample, **options)


@pytest.mark.parametrize(
    ("old", "new"), [(">> 27", ">> 26"), ("z + sample", "z + position"), (">> 40", ">> 41")]
)
def test_broken_bits_are_seen(broken, device, old, new):
    rows = torch.arange(9, device=device)
    u = broken(room, old, new).uniform(7, rows, rows * 3)
    assert not torch.equal(u, REFERENCE.uniform(7, rows, rows * 3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": torch.zeros(2, 262145)}, "logits: "),
        ({"logits": torch.zeros(2, 3).double()}, "logits: .*float64"),
        ({"logits": torch.zeros(2, 0)}, "logits: "),
        ({"uniform": torch.zeros(3)}, "uniform: "),
        ({"temperature": -1.0}, "temperature: "),
        ({"temperature": math.nan}, "temperature: "),
        ({"top_k": -1}, "top_k: "),
        ({"top_p": -0.1}, "top_p: "),
        ({"min_p": 1.1}, "min_p: "),
    ],
)
def test_wrong_arguments(changed, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        sample(**{"logits": torch.zeros(2, 3), "uniform": torch.zeros(2), **changed})


def test_wrong_rows():
    rows = torch.arange(3)
    for samples, positions, name in ((rows.int(), rows, "samples"), (rows, rows[:2], "positions")):
        with pytest.raises(ValueError, match=f"^{name}: "):
            uniform(0, samples, positions)


def test_opcheck_and_compile(device):
    logits, u = draws(2, 40, torch.float32, device)
    torch.library.opcheck(room._sample, (logits, u, 0.7, 5, 0.9, 0.1))
    rows = torch.arange(3, device=device)
    torch.library.opcheck(room._uniform, (3, rows, rows))

    def draw(logits, rows):
        return sample(logits, uniform(3, rows, rows), top_k=5)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, rows[:2]), draw(logits, rows[:2]))
