"""The reference against the formulas themselves: loops over plain Python numbers, float64."""

import cmath
import math
from collections import Counter
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from minillm.ops import REFERENCE

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def normal(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_rms_norm_by_loops(generator):
    x, w = normal(generator, 2, 3, 5), normal(generator, 5)
    y = REFERENCE.rms_norm(x, w, 0.1)
    for b, t in product(range(2), range(3)):
        row = x[b, t].tolist()
        rms = math.sqrt(sum(v * v for v in row) / 5 + 0.1)
        expected = [v / rms * g for v, g in zip(row, w.tolist(), strict=True)]
        assert y[b, t].tolist() == pytest.approx(expected, rel=1e-12)


def test_rms_norm_of_unit_weight_has_unit_mean_square(generator):
    y = REFERENCE.rms_norm(1e3 * normal(generator, 4, 64), torch.ones(64).double(), 0.0)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(4).double(), **EXACT)


def angles(T, D, base=10000.0):
    return [[t * base ** (-2 * i / D) for i in range(D // 2)] for t in range(T)]


def tables(T, D):
    a = torch.tensor(angles(T, D), dtype=torch.float64)
    return a.cos(), a.sin()


def test_rope_is_a_complex_product(generator):
    B, T, D = 2, 5, 6
    q, k = normal(generator, B, T, 4, D), normal(generator, B, T, 2, D)
    for x, y in zip((q, k), REFERENCE.rope(q, k, *tables(T, D)), strict=True):
        for b, t, h, i in product(range(B), range(T), range(x.shape[2]), range(D // 2)):
            number = complex(x[b, t, h, i], x[b, t, h, i + D // 2])
            turned = number * cmath.exp(1j * angles(T, D)[t][i])
            assert y[b, t, h, i].item() == pytest.approx(turned.real, abs=1e-12)
            assert y[b, t, h, i + D // 2].item() == pytest.approx(turned.imag, abs=1e-12)


def test_rope_products_depend_on_the_distance_alone(generator):
    T, D = 9, 8
    q, k = (normal(generator, 1, 1, 1, D).expand(1, T, 1, D) for _ in range(2))
    q, k = REFERENCE.rope(q, k, *tables(T, D))
    products = q[0, :, 0] @ k[0, :, 0].T  # (T, T)
    for distance in range(-T + 1, T):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), **EXACT)
    assert products[0].std() > 0.1


def test_rope_takes_one_table_a_row(generator):
    T, D = 4, 6
    q, k = normal(generator, 2, T, 2, D), normal(generator, 2, T, 1, D)
    cos, sin = tables(T + 3, D)
    starts = (0, 3)
    rows = [torch.stack([x[s : s + T] for s in starts]) for x in (cos, sin)]
    together = REFERENCE.rope(q, k, *rows)
    for b, s in enumerate(starts):
        alone = REFERENCE.rope(q[b : b + 1], k[b : b + 1], cos[s : s + T], sin[s : s + T])
        for x, y in zip(together, alone, strict=True):
            torch.testing.assert_close(x[b : b + 1], y, rtol=0, atol=0)


def test_rope_with_weights_normalises_first(generator):
    T, D = 4, 6
    q, k = normal(generator, 2, T, 2, D), normal(generator, 2, T, 1, D)
    wq, wk = normal(generator, D), normal(generator, D)
    ours = REFERENCE.rope(q, k, *tables(T, D), wq, wk, 0.3)
    normed = [
        x / torch.sqrt((x * x).sum(-1, keepdim=True) / D + 0.3) * w for x, w in ((q, wq), (k, wk))
    ]
    for x, y in zip(ours, REFERENCE.rope(*normed, *tables(T, D)), strict=True):
        torch.testing.assert_close(x, y, **EXACT)


def attention_by_loops(q, k, v, queries, sees, scale, softcap, slopes):
    """Plain Python; queries[b][t] is a position, sees(b, i, j) says whether i sees j."""
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    q, k, v = q.tolist(), k.tolist(), v.tolist()
    y = torch.zeros(B, T, H, D, dtype=torch.float64)
    for b, t, h in product(range(B), range(T), range(H)):
        i, g = queries[b][t], h // (H // G)
        weights = {}
        for j in range(S):
            if not sees(b, i, j):
                continue
            score = scale * sum(a * c for a, c in zip(q[b][t][h], k[b][j][g], strict=True))
            if softcap:
                score = softcap * math.tanh(score / softcap)
            weights[j] = math.exp(score - slopes[h] * (i - j))
        total = sum(weights.values())
        for d in range(D):
            y[b, t, h, d] = sum(w / total * v[b][j][g][d] for j, w in weights.items())
    return y


OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "window 1": {"window": 1},
    "window 3": {"window": 3},
    "window beyond the text": {"window": 100},
    "softcap": {"softcap": 0.8},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)},
    "documents": {"documents": torch.tensor([[0, 0, 1, 1, 1, 2, 3], [5, 4, 4, 4, 4, 4, 4]])},
}
OPTIONS["all"] = {
    name: value for key in OPTIONS if key != "window 1" for name, value in OPTIONS[key].items()
} | {"window": 3}


@pytest.mark.parametrize("G", [4, 2, 1])
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_by_loops(generator, name, G):
    B, T, H, D = 2, 7, 4, 4
    q = normal(generator, B, T, H, D)
    k, v = normal(generator, B, T, G, D), normal(generator, B, T, G, D)
    options = OPTIONS[name]
    window, documents = options.get("window", 0), options.get("documents")

    def sees(b, i, j):
        near = not window or i - j < window
        same = documents is None or documents[b, i] == documents[b, j]
        return j <= i and near and same

    expected = attention_by_loops(
        q,
        k,
        v,
        [range(T)] * B,
        sees,
        options.get("scale", 1 / math.sqrt(D)),
        options.get("softcap", 0.0),
        options.get("alibi_slopes", torch.zeros(H)).tolist(),
    )
    torch.testing.assert_close(REFERENCE.attention(q, k, v, **options), expected, **EXACT)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("lengths", [None, [7, 7], [7, 4], [3, 5]])
@pytest.mark.parametrize("name", [n for n in OPTIONS if n not in ("documents", "all")])
def test_decode_attention_by_loops(generator, name, lengths, T):
    B, S, H, G, D = 2, 7, 4, 2, 4
    q = normal(generator, B, T, H, D)
    k, v = normal(generator, B, S, G, D), normal(generator, B, S, G, D)
    options = OPTIONS[name]
    window = options.get("window", 0)
    held = lengths or [S] * B
    expected = attention_by_loops(
        q,
        k,
        v,
        [range(n - T, n) for n in held],
        lambda b, i, j: j <= i and (not window or i - j < window),
        options.get("scale", 1 / math.sqrt(D)),
        options.get("softcap", 0.0),
        options.get("alibi_slopes", torch.zeros(H)).tolist(),
    )
    given_lengths = None if lengths is None else torch.tensor(lengths)
    y = REFERENCE.decode_attention(q, k, v, given_lengths, **options)
    torch.testing.assert_close(y, expected, **EXACT)


@pytest.mark.parametrize("window", [0, 2])
def test_decode_attention_is_the_end_of_attention(generator, window):
    B, S, T, H, G, D = 2, 6, 3, 4, 2, 4
    q = normal(generator, B, S, H, D)
    k, v = normal(generator, B, S, G, D), normal(generator, B, S, G, D)
    whole = REFERENCE.attention(q, k, v, window=window)
    ends = REFERENCE.decode_attention(q[:, -T:], k, v, window=window)
    torch.testing.assert_close(ends, whole[:, -T:], **EXACT)


def test_attention_dropout_keeps_the_mean_and_drops_whole_weights():
    # With one key, a probability is 1: dropped to 0 or kept at 1 / (1 - p).
    v = torch.ones(1000, 1, 2, 1, dtype=torch.float64)
    torch.manual_seed(0)
    y = REFERENCE.attention(v, v, v, dropout=0.25)
    assert set(y.flatten().tolist()) == {0.0, 1 / 0.75}
    kept = (y > 0).double().mean().item()
    assert abs(kept - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 2000)  # five standard deviations


def test_gates_by_elements(generator):
    x = 3 * normal(generator, 5, 6)
    swish, gelu, square = REFERENCE.swiglu(x), REFERENCE.geglu(x), REFERENCE.relu2(x)
    assert swish.shape == gelu.shape == (5, 3)
    for r, c in product(range(5), range(3)):
        gate, up = x[r, c].item(), x[r, c + 3].item()
        assert swish[r, c].item() == pytest.approx(gate / (1 + math.exp(-gate)) * up, rel=1e-12)
        phi = 0.5 * math.erfc(-gate / math.sqrt(2))
        assert gelu[r, c].item() == pytest.approx(gate * phi * up, rel=1e-12)
    for r, c in product(range(5), range(6)):
        z = x[r, c].item()
        assert square[r, c].item() == pytest.approx(z * z if z > 0 else 0.0, rel=1e-12)


HEADS = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "z-loss": {"z_loss": 0.3},
    "both": {"softcap": 1.5, "z_loss": 0.3},
    "index 2 ignored": {"ignore_index": 2},
    "index beyond the vocabulary ignored": {"ignore_index": 1000},
}


@pytest.mark.parametrize("name", HEADS)
def test_linear_cross_entropy_is_cross_entropy(generator, name):
    options = HEADS[name]
    ignored = options.get("ignore_index", -100)
    x, w = normal(generator, 6, 4).requires_grad_(), normal(generator, 9, 4).requires_grad_()
    targets = torch.tensor([0, ignored, 8, 2, 3, ignored])
    loss = REFERENCE.linear_cross_entropy(x, w, targets, **options)

    z = F.linear(x, w)
    if cap := options.get("softcap"):
        z = cap * torch.tanh(z / cap)
    expected = F.cross_entropy(z, targets, ignore_index=ignored)
    counted = z[targets != ignored]
    expected = expected + options.get("z_loss", 0) * counted.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(loss, expected, **EXACT)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_linear_cross_entropy_by_loops(generator):
    x, w = normal(generator, 3, 2).tolist(), normal(generator, 4, 2).tolist()
    targets, total = [3, 0, -100], 0.0
    for row, target in zip(x[:2], targets[:2], strict=True):
        z = [sum(a * b for a, b in zip(row, column, strict=True)) for column in w]
        total -= math.log(math.exp(z[target]) / sum(map(math.exp, z)))
    wide = {"dtype": torch.float64}
    loss = REFERENCE.linear_cross_entropy(
        torch.tensor(x, **wide), torch.tensor(w, **wide), torch.tensor(targets)
    )
    assert loss.item() == pytest.approx(total / 2, rel=1e-12)


@pytest.mark.parametrize("target", [-5, 9])
def test_linear_cross_entropy_refuses_targets_outside_the_vocabulary(generator, target):
    x, w = normal(generator, 2, 4), normal(generator, 9, 4)
    with pytest.raises((IndexError, RuntimeError)):
        REFERENCE.linear_cross_entropy(x, w, torch.tensor([1, target]))


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (2, 3, 8, 5), (1, 7)])
def test_newton_schulz_is_a_polynomial_of_the_singular_values(generator, shape):
    g = normal(generator, *shape)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = u @ torch.diag_embed(s) @ vh
    # The 1e-7 beside the norm, and its growth by 3.4445 in each of five steps.
    close = {"rtol": 0, "atol": 1e-7 * 3.4445**5}
    torch.testing.assert_close(REFERENCE.newton_schulz(g), expected, **close)


def test_newton_schulz_brings_singular_values_near_one(generator):
    u, v = (torch.linalg.qr(normal(generator, 40, 40)).Q for _ in range(2))
    s = torch.logspace(-1.5, 0, 40, dtype=torch.float64)
    after = torch.linalg.svdvals(REFERENCE.newton_schulz(u @ s.diag() @ v))
    assert 0.65 < after.min() < 0.8 and 1.1 < after.max() < 1.25
    zero = torch.zeros(3, 4)
    assert REFERENCE.newton_schulz(zero).equal(zero)


def kept_by_hand(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities after the filters, by sorting Python lists."""
    highest = max(logits)
    p = [math.exp((z - highest) / temperature) for z in logits]

    def keep(test):
        left = [x if test(x) else 0.0 for x in p]
        return [x / sum(left) for x in left]

    if top_k:
        border = sorted(p, reverse=True)[min(top_k, len(p)) - 1]
        p = keep(lambda x: x >= border)
    p = keep(lambda x: True)
    if top_p < 1:
        mass = 0.0
        for border in sorted(p, reverse=True):
            mass += border
            if mass >= top_p:
                break
        p = keep(lambda x: x >= border)
    if min_p:
        border = min_p * max(p)
        p = keep(lambda x: x >= border)
    return p


def drawn(logits, **options):
    """The share of each token, from draws at the middles of M equal parts of [0, 1)."""
    M = 4000
    u = (torch.arange(M, dtype=torch.float64) + 0.5) / M
    rows = torch.tensor(logits, dtype=torch.float64).expand(M, -1)
    ids = REFERENCE.sample(rows, u, **options)
    assert ids.dtype == torch.int64 and ids.shape == (M,)
    return (torch.bincount(ids, minlength=len(logits)) / M).tolist(), 1 / M


LOGITS = [0.3, 2.1, -1.0, 1.7, 0.9, -0.2, 1.1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 7},
        {"top_k": 100},
        {"top_p": 0.01},
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"top_k": 4, "top_p": 0.6},  # of what top-k left; of the whole it would be one more
        {"top_p": 0.8, "min_p": 0.4},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.7, "min_p": 0.5},
    ],
    ids=str,
)
def test_sample_draws_the_filtered_distribution(options):
    shares, part = drawn(LOGITS, **options)
    for share, p in zip(shares, kept_by_hand(LOGITS, **options), strict=True):
        assert abs(share - p) <= 1.01 * part  # an interval of length p holds pM parts, give or take
        assert (share > 0) == (p > 0)


def test_top_k_comes_before_top_p():
    # The three largest hold 0.5, 0.2, 0.1 of the mass: 0.8 of it is all three, but of the first
    # two alone 0.8 is more than the first, so both; top-p first would leave a third in.
    logits = [math.log(p) for p in (0.5, 0.2, 0.1, 0.1, 0.1)]
    shares, _ = drawn(logits, top_k=2, top_p=0.72)
    assert [s > 0 for s in shares] == [True, True, False, False, False]
    shares, _ = drawn(logits, top_k=2, top_p=0.71)  # 0.5 / 0.7 = 0.714
    assert [s > 0 for s in shares] == [True, False, False, False, False]


def test_top_p_stops_where_the_mass_is_reached():
    logits = torch.tensor([1.0, 0.5, 0.25, 0.25], dtype=torch.float64).log()
    assert logits.softmax(-1).tolist() == [0.5, 0.25, 0.125, 0.125]  # exactly
    for top_p, kept in ((0.5, 1), (0.5 + 1e-9, 2), (0.75, 2)):
        shares, _ = drawn(logits.tolist(), top_p=top_p)
        assert sum(s > 0 for s in shares) == kept


def test_ties_at_the_border_are_kept():
    logits = [1.0, 2.0, 1.0, 0.0, 1.0]
    for options in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": math.exp(-1) * 0.999}):
        shares, _ = drawn(logits, **options)
        assert [s > 0 for s in shares] == [True, True, True, False, True], options


def test_temperature_zero_takes_the_first_largest():
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 5.0]])
    ids = REFERENCE.sample(logits, torch.tensor([0.99, 0.99]), temperature=0.0)
    assert ids.tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-30, 1e-46, 5e-324])
def test_a_tiny_temperature_is_greedy(generator, temperature):
    logits = torch.randn(50, 20, generator=generator)
    u = torch.rand(50, generator=generator)
    ids = REFERENCE.sample(logits, u, temperature=temperature)
    assert ids.equal(logits.argmax(-1))


def test_a_huge_temperature_is_uniform():
    shares, part = drawn(LOGITS, temperature=1e30)
    assert all(abs(s - 1 / 7) <= 1.01 * part for s in shares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [0.0, 1e-300, 0.5, 1 - 2**-24, 1 - 2**-53])
def test_a_token_without_mass_is_never_drawn(generator, u, dtype):
    logits = torch.randn(20, 5000, generator=generator).to(dtype)
    logits[:, 0] = logits[:, -1] = -math.inf
    logits[:, 1:400] = -1e5  # exp underflows to nothing
    logits[:, -400:-1] = -1e5
    uniform = torch.full((20,), u, dtype=torch.float64)
    for options in ({}, {"top_k": 50}, {"top_p": 0.3}, {"min_p": 0.5}):
        ids = REFERENCE.sample(logits, uniform, **options)
        assert ids.min() >= 400 and ids.max() < 4600


def test_sample_is_monotone_in_u_and_row_by_row(generator):
    logits = torch.randn(1, 30, generator=generator).expand(100, -1)
    u = torch.rand(100, generator=generator).sort().values
    ids = REFERENCE.sample(logits, u)
    assert ids.diff().min() >= 0 and ids[0] < ids[-1]
    mixed = torch.randn(100, 30, generator=generator)
    alone = [REFERENCE.sample(mixed[i : i + 1], u[i : i + 1], top_k=5).item() for i in range(100)]
    assert REFERENCE.sample(mixed, u, top_k=5).tolist() == alone


@given(
    logits=st.lists(st.floats(-8, 8), min_size=1, max_size=12, unique=True),
    temperature=st.floats(0.2, 5),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 1),
    u=st.floats(0, 1, exclude_max=True),
)
def test_sample_draws_only_what_the_filters_keep(logits, temperature, top_k, top_p, min_p, u):
    options = {"temperature": temperature, "top_k": top_k, "min_p": min_p}
    rows = torch.tensor([logits], dtype=torch.float64)
    uniform = torch.tensor([u], dtype=torch.float64)
    token = REFERENCE.sample(rows, uniform, top_p=top_p, **options).item()
    # A hair more and less than asked, so that rounding at a border decides nothing.
    wider = {"top_p": min(1.0, top_p + 1e-9), **options, "min_p": min_p * (1 - 1e-9)}
    p = kept_by_hand(logits, **wider)
    assert p[token] > 0
    below, above = sum(p[:token]), sum(p[: token + 1])
    if p == kept_by_hand(logits, **options, top_p=top_p):
        assert below - 1e-9 <= u <= above + 1e-9


def test_a_top_p_that_is_nothing_in_fp32_keeps_the_likeliest():
    ids = REFERENCE.sample(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0.99]), top_p=1e-300)
    assert ids.tolist() == [1]


def test_add_and_sandwich_norm_are_norms_of_sums(generator):
    x, residual = torch.randn(2, 3, 8, generator=generator)
    a, b = torch.randn(2, 8, generator=generator)
    y, s = REFERENCE.add_rms_norm(x, residual, a)
    assert torch.equal(s, x + residual) and torch.equal(y, REFERENCE.rms_norm(x + residual, a))
    y, h = REFERENCE.sandwich_norm(x, residual, a, b)
    assert torch.equal(h, REFERENCE.rms_norm(x + residual, a))
    assert torch.equal(y, REFERENCE.rms_norm(h, b))


def test_adamw_by_scalars():
    """Three steps of one number, in Python's floats; the gradient is scaled, then used."""
    p, m, v, g, lr, wd, b1, b2, eps = 0.7, 0.0, 0.0, -3.0, 0.1, 0.2, 0.9, 0.99, 1e-8
    tensors = [[torch.tensor([x], dtype=torch.float64)] for x in (p, g, m, v)]
    scale = torch.tensor(0.5, dtype=torch.float64)
    for step in (1, 2, 3):
        REFERENCE.adamw(
            *tensors, step, lr=[lr], weight_decay=[wd], betas=(b1, b2), eps=eps, grad_scale=scale
        )
        m, v = b1 * m + (1 - b1) * g * 0.5, b2 * v + (1 - b2) * (g * 0.5) ** 2
        p = p * (1 - lr * wd)
        p -= lr * (m / (1 - b1**step)) / (math.sqrt(v / (1 - b2**step)) + eps)
    for (tensor,), expected in zip(tensors, (p, g, m, v), strict=True):
        assert tensor.item() == pytest.approx(expected, rel=1e-14)


def uniforms(*keys):
    """The number of each (seed, sample, position)."""
    return [REFERENCE.uniform(s, torch.tensor([r]), torch.tensor([p])).item() for s, r, p in keys]


def test_uniform_by_integers():
    """splitmix64's finaliser in Python's integers."""

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    for key in [(0, 0, 0), (1337, 5, 77), (2**64 - 1, 3, 2**40), (-1, 2, 3)]:
        state = 0
        for word in key:
            state = mix(mix((state + word + 0x9E3779B97F4A7C15) % 2**64))
        assert uniforms(key) == [(state >> 40) / 2**24]


def test_uniform_is_equidistributed():
    draws = []
    for seed in range(30):
        rows, made = torch.meshgrid(torch.arange(30), torch.arange(30), indexing="ij")
        draws += REFERENCE.uniform(seed, rows.flatten(), made.flatten()).tolist()
    assert all(0 <= u < 1 for u in draws)
    # Chi-square with 255 degrees of freedom: mean 255, standard deviation sqrt(510) = 22.6; five
    # of those are passed by chance once in a million times.
    counts = Counter(int(u * 256) for u in draws)
    expected = len(draws) / 256
    chi_square = sum((counts[b] - expected) ** 2 / expected for b in range(256))
    assert 255 - 5 * 22.6 < chi_square < 255 + 5 * 22.6


def test_uniforms_streams_do_not_meet():
    seen = set()
    for seed, row in product(range(40), range(40)):
        rows, made = torch.full((8,), row), torch.arange(8)
        stream = REFERENCE.uniform(seed, rows, made).tolist()
        # Two neighbours are 48 bits: 11,200 of them meet by chance once in four million times.
        for pair in pairwise(stream):
            assert pair not in seen
            seen.add(pair)
    assert len(set(uniforms((1, 2, 3), (3, 2, 1), (2, 1, 3), (6, 0, 0)))) == 4
