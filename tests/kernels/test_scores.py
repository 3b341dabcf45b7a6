"""Attention's scores and the logits of the loss are fp32 where the stream is bf16.

The right values are computed here, in float64, from the formulas themselves.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from minillm.kernels import attention, decode_attention, linear_cross_entropy
from minillm.ops import EAGER
from tests.support.broad import broad

ATTENTIONS = {"eager": EAGER.attention, "triton": attention.attention}
DECODES = {"eager": EAGER.decode_attention, "triton": decode_attention.decode_attention}
LOSSES = {
    "eager": EAGER.linear_cross_entropy,
    "triton": linear_cross_entropy.linear_cross_entropy,
}
B, T, H, D = 1, 70, 3, 16
SLOPES = torch.tensor([0.63, 0.4, 0.25])  # no powers of two: not exact in bf16


def exact(q, k, v, window=0, slopes=None):
    """softmax(q k^T / sqrt(D) - slope distance) v in float64."""
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    s = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
    if slopes is not None:
        s = s - slopes.double()[:, None, None] * (i - j)
    seen = (j <= i) & (i - j < (window or T))
    return torch.einsum("bhts,bshd->bthd", s.masked_fill(~seen, -math.inf).softmax(-1), v)


def torchs(q, k, v, window=0):
    """PyTorch's own kernel."""
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    mask = (j <= i) & (i - j < (window or T))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def heads(generator, size, dtype=torch.bfloat16):
    q, k, v, dy = (torch.randn(B, T, H, D, generator=generator) for _ in range(4))
    return [x.to(dtype) for x in (q * size, k * size, v, dy)]


def with_gradients(op, q, k, v, dy, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = op(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def error(x, truth):
    return ((x.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("window", [0, 9])
@broad("size", [1, 2, 8], quick=(2,))
@pytest.mark.parametrize("table", ATTENTIONS)
def test_bf16_attention_errs_at_most_twice_as_much_as_pytorchs(generator, table, size, window):
    """Values and gradients, as large as the scores may be; and without gradients the same."""
    inputs = heads(generator, size)
    truth = with_gradients(exact, *(x.double() for x in inputs), window=window)
    theirs = with_gradients(torchs, *inputs, window=window)
    ours = with_gradients(ATTENTIONS[table], *inputs, window=window)
    for x, y, t in zip(ours, theirs, truth, strict=True):
        assert error(x, t) <= 2 * error(y, t)
    with torch.no_grad():
        evaluated = ATTENTIONS[table](*inputs[:3], window=window)
    assert error(evaluated, truth[0]) <= 2 * error(theirs[0], truth[0])
    assert error(ours[0], evaluated.double()) <= 3 * error(theirs[0], truth[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=["eval", "train"])
@pytest.mark.parametrize("table", ATTENTIONS)
def test_a_bias_of_alibi_is_not_rounded_to_bf16(generator, table, mode):
    """Keys that the last query likes the better, the further they are: they make up for the bias,
    so that its scores differ by little, while a bias of 40 would be rounded by 0.1.
    """
    _, _, v, _ = heads(generator, 1)
    q = torch.ones_like(v)
    far = T - 1 - torch.arange(T)[:, None]
    k = (far * SLOPES / math.sqrt(D))[None, :, :, None].expand_as(q).bfloat16()
    truth = exact(q.double(), k.double(), v.double(), slopes=SLOPES)
    with mode():
        y = ATTENTIONS[table](q, k, v, alibi_slopes=SLOPES)
    assert error(y[:, -1], truth[:, -1]) <= 2**-8
    with torch.no_grad():
        y = DECODES[table](q[:, -1:], k, v, alibi_slopes=SLOPES)
    assert error(y, truth[:, -1:]) <= 2**-8


def loss_in_float64(x, w, targets, softcap=0.0, z_loss=0.0):
    z = x @ w.t()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    lse = z.logsumexp(-1)
    return (lse - z.gather(1, targets[:, None])[:, 0] + z_loss * lse**2).mean()


@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "z_loss": 1e-3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("table", LOSSES)
def test_logits_are_not_rounded_before_their_softmax(generator, table, dtype, options):
    """Logits of up to 60, which bf16 would round by 0.1; with gradients and without."""
    x = (torch.randn(40, 32, generator=generator) * 2).to(dtype)
    w = (torch.randn(300, 32, generator=generator) * 2).to(dtype)
    targets = torch.randint(300, (40,), generator=generator)
    leaves = [x.double().requires_grad_(), w.double().requires_grad_()]
    truth = loss_in_float64(*leaves, targets, **options)
    gradients = torch.autograd.grad(truth, leaves)
    ours = [x.requires_grad_(), w.requires_grad_()]
    loss = LOSSES[table](*ours, targets, **options)
    assert abs(loss.item() - truth.item()) <= 1e-5 * truth.item()
    for got, t in zip(torch.autograd.grad(loss, ours), gradients, strict=True):
        assert error(got, t) <= 2 * torch.finfo(dtype).eps
    with torch.no_grad():
        assert abs(LOSSES[table](*ours, targets, **options).item() - truth.item()) <= 1e-5 * truth
