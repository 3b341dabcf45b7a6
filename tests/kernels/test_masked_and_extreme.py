"""What is masked does not matter, whatever it holds; and numbers of any size have right results.

The right values are computed here, in float64, from the formulas themselves.
"""

import math

import pytest
import torch

from minillm.kernels import (
    attention,
    decode_attention,
    linear_cross_entropy,
    sample as sampling,
)
from minillm.ops import EAGER, REFERENCE
from tests.support.broad import broad

ATTENTIONS = {
    "reference": REFERENCE.attention,
    "eager": EAGER.attention,
    "triton": attention.attention,
}
DECODES = {
    "reference": REFERENCE.decode_attention,
    "eager": EAGER.decode_attention,
    "triton": decode_attention.decode_attention,
}
LOSSES = {
    "reference": REFERENCE.linear_cross_entropy,
    "eager": EAGER.linear_cross_entropy,
    "triton": linear_cross_entropy.linear_cross_entropy,
}
SAMPLES = {"eager": EAGER.sample, "triton": sampling.sample}
B, S, H, G, D = 3, 40, 4, 2, 8
SLOPES = torch.tensor([0.5, 0.25, 0.3, 0.1])
OPTIONS = {
    "plain": {},
    "window": {"window": 6},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi, window": {"alibi_slopes": SLOPES, "window": 6},
    "softcap, alibi, window": {"softcap": 2.0, "alibi_slopes": SLOPES, "window": 6},
}


def one_query(q, k, v, at, window=0, softcap=0.0, alibi_slopes=None):
    """Attention of one query (H, D) at position `at` to k, v (S, G, D), in float64: (H, D)."""
    first = max(0, at - window + 1) if window else 0
    if at < 0:
        return torch.zeros(q.shape, dtype=torch.float64)
    k, v = (x[first : at + 1].double().repeat_interleave(H // G, 1) for x in (k, v))
    s = torch.einsum("hd,shd->hs", q.double(), k) / math.sqrt(D)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    if alibi_slopes is not None:
        s = s - alibi_slopes.double()[:, None] * (at - torch.arange(first, at + 1))
    return torch.einsum("hs,shd->hd", s.softmax(-1), v)


@broad("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("T", [1, 4])
@broad("name", OPTIONS, quick=(0, 5))
@pytest.mark.parametrize("table", DECODES)
@torch.no_grad()
def test_entries_beyond_lengths_do_not_reach_the_result(generator, table, name, T, garbage):
    """Nor those before all windows; a query that stands before its row sees nothing: zeros."""
    options, window = OPTIONS[name], OPTIONS[name].get("window", S)
    for dtype, lengths in ((torch.float32, [S, 9, 2]), (torch.bfloat16, [17, 30, 5])):
        q = torch.randn(B, T, H, D, generator=generator).to(dtype)
        k, v = (torch.randn(B, S, G, D, generator=generator).to(dtype) for _ in range(2))
        for b, n in enumerate(lengths):
            for x in (k, v):
                x[b, n:] = garbage
                x[b, : max(0, n - T - window + 1)] = garbage
        y = DECODES[table](q, k, v, torch.tensor(lengths), **options)
        for b, n in enumerate(lengths):
            for t in range(T):
                truth = one_query(q[b, t], k[b], v[b], n - T + t, **options)
                error = (y[b, t].double() - truth).norm() / max(truth.norm(), 1)
                assert error <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("table", DECODES)
@torch.no_grad()
def test_entries_before_the_windows_of_a_full_cache_do_not_matter(generator, table, T):
    q = torch.randn(B, T, H, D, generator=generator)
    k, v = (torch.randn(B, S, G, D, generator=generator) for _ in range(2))
    k[:, : S - T - 5] = v[:, : S - T - 5] = math.nan
    for options in ({"window": 6}, {"window": 6, "alibi_slopes": SLOPES}):
        y = DECODES[table](q, k, v, **options)
        for t in range(T):
            truth = one_query(q[0, t], k[0], v[0], S - T + t, **options)
            torch.testing.assert_close(y[0, t].double(), truth, rtol=1e-5, atol=1e-5)


def loss_in_float64(x, w, targets, softcap=0.0, z_loss=0.0):
    z = x.double() @ w.double().t()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    each = -z.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return (each + z_loss * z.logsumexp(-1).square() if z_loss else each).mean()


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("table", LOSSES)
def test_rows_that_do_not_count_may_hold_anything(generator, table, dtype, garbage):
    x, w = torch.randn(12, 8, generator=generator), torch.randn(30, 8, generator=generator)
    targets = torch.randint(30, (12,), generator=generator)
    counts = torch.arange(12) % 3 > 0
    x[~counts], targets[~counts] = garbage, -100
    for options in ({}, {"softcap": 5.0, "z_loss": 0.1}):
        leaves = [x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()]
        loss = LOSSES[table](*leaves, targets, **options)
        dx, dw = torch.autograd.grad(loss, leaves)
        exact = [leaves[0].detach()[counts].double().requires_grad_(),
                 leaves[1].detach().double().requires_grad_()]  # fmt: skip
        truth = loss_in_float64(*exact, targets[counts], **options)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
        assert not dx[~counts].any()
        close = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps}
        for ours, theirs in zip((dx[counts], dw), torch.autograd.grad(truth, exact), strict=True):
            torch.testing.assert_close(ours.double(), theirs, **close)
        with torch.no_grad():
            assert LOSSES[table](*leaves, targets, **options).item() == pytest.approx(truth.item())


FAR = [-(2.0**100), -(2.0**70), 2.0**70, 2.0**100]  # sums of powers of two are exact


@broad("score", FAR, quick=(0, 3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("table", ATTENTIONS)
@torch.no_grad()
def test_attention_to_scores_beyond_1e20(generator, table, dtype, score):
    """Equal scores: the mean of what is seen; and one key that is better by far: its value."""
    q = torch.full((1, S, 2, D), abs(score) ** 0.5).to(dtype)
    k = (q * math.copysign(1, score)).clone()
    v = torch.randn(1, S, 2, D, generator=generator).to(dtype)
    documents = (torch.arange(S) >= 11)[None].long()
    i, j = torch.arange(S)[:, None], torch.arange(S)[None, :]
    close = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps}
    seen = j <= i
    for options, mask in (({}, seen), ({"window": 5}, seen & (i - j < 5)),
                          ({"documents": documents}, seen & ((i >= 11) == (j >= 11)))):  # fmt: skip
        y = ATTENTIONS[table](q, k, v, **options)
        truth = torch.einsum("ij,bjhd->bihd", mask.double() / mask.sum(1, keepdim=True), v.double())
        torch.testing.assert_close(y.double(), truth, **close)
    for options in ({}, {"lengths": torch.tensor([29])}):
        y = DECODES[table](q[:, -1:], k, v, **options)
        n = 29 if options else S
        torch.testing.assert_close(y[:, 0].double(), v[:, :n].double().mean(1), **close)
    k[:, 7] *= 2 if score > 0 else 0.5
    y = ATTENTIONS[table](q, k, v)
    torch.testing.assert_close(y[:, 8:], v[:, 7:8].expand_as(y[:, 8:]))
    torch.testing.assert_close(DECODES[table](q[:, -1:], k, v)[:, 0], v[:, 7])


@pytest.mark.parametrize("table", ["reference", "triton"])  # PyTorch's own backward gives inf
def test_gradients_of_attention_to_scores_below_1e20(generator, table):
    """One key is better by far than all others, which are below -1e20 as it is: p is 1 or 0."""
    q = torch.full((1, S, 2, D), 2.0**40)
    k = -q * (1 + torch.arange(S, 0, -1))[None, :, None, None]  # the last is the best
    v = torch.randn(1, S, 2, D, generator=generator)
    dy = torch.randn(1, S, 2, D, generator=generator)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = ATTENTIONS[table](*leaves)
    dq, dk, dv = torch.autograd.grad(y, leaves, dy)
    torch.testing.assert_close(y, v)
    torch.testing.assert_close(dv, dy)
    assert dq.isfinite().all() and dk.isfinite().all()


@broad("logit", FAR, quick=(0, 3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("table", LOSSES)
def test_the_loss_of_logits_beyond_1e20(table, dtype, logit):
    """Equal logits: log V and p = 1 / V, although the square of lse is beyond fp32."""
    V, C = 32, 4
    x = torch.full((6, C), 0.5).to(dtype).requires_grad_()
    w = torch.full((V, C), logit / 2).to(dtype).requires_grad_()
    targets = torch.tensor([0, 1, 2, -100, 4, 5])
    loss = LOSSES[table](x, w, targets)
    assert loss.item() == pytest.approx(math.log(V))
    (dw,) = torch.autograd.grad(loss, w)
    expected = torch.full((V, C), 0.5 / V)
    expected[targets[targets >= 0]] -= 0.5 / 5
    torch.testing.assert_close(dw.float(), expected, rtol=0.02, atol=0)
    with torch.no_grad():
        w[7] *= 2 if logit > 0 else 0.5
        assert LOSSES[table](x[:1], w, torch.tensor([7])).item() == 0


@broad("logit", FAR, quick=(0, 3))
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 32}, {"top_p": 0.9999999, "min_p": 0.5}], ids=str
)
@pytest.mark.parametrize("table", SAMPLES)
def test_drawing_from_logits_beyond_1e20(table, options, logit):
    """Equal ones are equally probable; one that is better by far is drawn."""
    u = (torch.arange(4) + 0.5) / 4
    logits = torch.full((4, 32), logit)
    assert SAMPLES[table](logits, u, **options).tolist() == [8 * n + 4 for n in range(4)]
    logits[:, 7] *= 2 if logit > 0 else 0.5
    for temperature in (0.0, 1.0, 3.0):
        tokens = SAMPLES[table](logits, u, temperature=temperature, **options)
        assert tokens.tolist() == [7] * 4
