"""fp16 holds nothing above 65504 and little below 6e-5: what is normalised first, and then rounded.

The right values are computed here, in float64, from the formulas themselves.
"""

import json

import pytest
import torch

from minillm.kernels import linear_cross_entropy, newton_schulz
from minillm.ops import EAGER, REFERENCE
from minillm.optim.muon import Muon

LOSSES = {
    "reference": REFERENCE.linear_cross_entropy,
    "eager": EAGER.linear_cross_entropy,
    "triton": linear_cross_entropy.linear_cross_entropy,
}
LEAST = 2.0**-24  # the smallest number of fp16 above 0


def constant_rows(N, V, C=8):
    """One row of x N times, weights and targets of few words; dx of a row and dw, in float64."""
    numbers = torch.Generator().manual_seed(0)
    row = torch.randn(C, generator=numbers).half()
    w = (torch.randn(V, C, generator=numbers) / 8).half()
    targets = torch.randint(V // 16, (N,), generator=numbers)
    p = (w.double() @ row.double()).softmax(0)
    dz = p - torch.bincount(targets, minlength=V) / N  # the mean over rows
    dx = (p @ w.double() - w[targets].double()) / N
    return row.expand(N, C), w, targets, dx, dz[:, None] * row.double()


def gradients_at_every_loss_scale(loss, N, V, most=16):
    """Each is 2^k times the float64 gradient, to 1e-3 or half of fp16's smallest number."""
    x, w, targets, dx, dw = constant_rows(N, V)
    x, w = x.clone().requires_grad_(), w.float().requires_grad_()
    value = loss(x, w, targets)
    for k in range(most + 1):
        scale = torch.tensor(2.0**k)
        ours = torch.autograd.grad(value, (x, w), scale, retain_graph=True)
        for got, exact in zip(ours, (dx, dw), strict=True):
            floor = LEAST / 2 if got.dtype == torch.float16 else 1e-12
            allowed = 1e-3 * 2**k * exact.abs() + floor
            # dx is a sum in which terms cancel; its scale is that of its terms.
            allowed += 1e-3 * 2**k * exact.abs().mean() if exact is dx else 0
            assert ((got.double() - 2**k * exact).abs() <= allowed).all(), f"2^{k}"


@pytest.mark.parametrize("table", LOSSES)
def test_a_loss_scale_multiplies_fp16_gradients_before_they_are_rounded(table):
    gradients_at_every_loss_scale(LOSSES[table], 128, 512)


@pytest.mark.slow
@pytest.mark.parametrize(("table", "rows"), [("eager", 16384), ("triton", 1024)])
def test_a_loss_scale_multiplies_fp16_gradients_of_many_rows_and_words(table, rows):
    """The interpreter needs minutes for 16,384 rows; as they are equal, fewer show the same."""
    gradients_at_every_loss_scale(LOSSES[table], rows, 8192)


@pytest.mark.parametrize("table", LOSSES)
def test_words_that_are_absent_from_a_large_batch_get_their_gradient(table):
    """dw of a word that is no target is p x = 1 / V, not the rounded 1 / (N V) times N."""
    N, V = 512 if table == "eager" else 64, 6000
    x, w = torch.ones(N, 8).half(), torch.zeros(V, 8, dtype=torch.float16, requires_grad=True)
    targets = torch.arange(N) % 50
    (dw,) = torch.autograd.grad(LOSSES[table](x, w, targets), w, torch.tensor(1024.0))
    torch.testing.assert_close(dw[50:], torch.full_like(dw[50:], 1024 / V), rtol=1e-3, atol=0)


@pytest.mark.parametrize("table", LOSSES)
def test_a_gradient_of_fp16_weights_is_divided_before_it_is_rounded(table):
    """Summed over 128 rows it is beyond fp16, its mean is not: (1 / 32 - 1) 640 = -620."""
    x, w = torch.full((128, 16), 640.0).half(), torch.zeros(32, 16).half().requires_grad_()
    loss = LOSSES[table](x, w, torch.zeros(128, dtype=torch.int64))
    (dw,) = torch.autograd.grad(loss, w)
    expected = torch.full((32, 16), 20.0)
    expected[0] = -620
    torch.testing.assert_close(dw.float(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-8, 1.0, 2e4, 1e9])
@pytest.mark.parametrize("table", [REFERENCE, EAGER, newton_schulz], ids=["ref", "eager", "triton"])
def test_newton_schulz_normalises_before_it_rounds(generator, table, size, dtype):
    """The polynomial of the singular values in float64; the products err by their rounding."""
    g = torch.randn(24, 40, generator=generator) * size
    u, s, v = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / (g.double().norm() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    y = table.newton_schulz(g, dtype=dtype)
    assert y.dtype == dtype
    error = (y.double() - u * s @ v).norm() / s.norm()
    assert error <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("size", [1e-8, 2e4, 1e9])
def test_muon_moves_in_fp16_whatever_the_size_of_the_gradients(generator, size):
    """As far as in fp32, to the rounding of five steps in fp16."""
    g, moved = torch.randn(24, 40, generator=generator) * size, []
    for dtype in (torch.float16, torch.float32):
        w = torch.nn.Parameter(torch.zeros(24, 40))
        w.grad = g.clone()
        Muon([{"params": [w], "parts": [(24,)]}], EAGER, lr=0.1, dtype=dtype).step()
        moved.append(w.detach())
    assert (moved[0] - moved[1]).norm() <= 0.02 * moved[1].norm()


def test_the_first_fp16_step_is_taken(train, tmp_path):
    """With one micro-batch the whole loss scale, 65536, is the gradient that reaches the loss."""
    flags = ["--dtype", "fp16", "--log-every", "1", "--micro-batch-size", "4", "--batch-size", "4"]
    assert train("--out", tmp_path / "run", *flags) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss_scale" in row]
    assert rows[0]["loss_scale"] == 65536 == rows[1]["loss_scale"]
    assert all(row["grad_norm"] is not None for row in rows)
