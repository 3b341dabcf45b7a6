"""The symmetric products and what is built of them answer to plain products."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from minillm.kernels import _launch, newton_schulz as room
from minillm.kernels.newton_schulz import newton_schulz, symmetric_square, xxt
from minillm.ops import EAGER, REFERENCE
from tests.support.broad import broad

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = {"BLOCK_M": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
B, C = -4.775, 2.0315


@pytest.fixture(params=[80, 90])
def arch(request, monkeypatch):
    """Tiles through pointers, and through descriptors; on a GPU its own."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(_launch, "arch", lambda: request.param)


def normal(shape, dtype, device, scale=1.0, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=numbers) * scale).to(device, dtype)


def symmetric(batch, M, dtype, device):  # noqa: N803
    """Symmetric matrices with a norm near one, as the products see them."""
    x = normal((batch, M, M), torch.float32, device, 1 / (2 * M))
    return (x + x.mT).to(dtype)


def plain_xxt(x):
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide @ wide.mT).to(x.dtype)


def plain_square(s):
    wide = s if s.dtype == torch.float64 else s.float()
    return (B * wide + C * (wide @ wide)).to(s.dtype)


def check_xxt(compare, x, op=xxt):
    compare([op(x)], [plain_xxt(x)], [plain_xxt(x.double())])


def check_square(compare, s, op=symmetric_square):
    compare([op(s, B, C)], [plain_square(s)], [plain_square(s.double())])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tall", [False, True])
def test_default_tiles(compare, device, arch, dtype, tall):
    """Each row of the tables; five and six tiles a side; sizes that divide by 16 and do not."""
    wide = ((1, 584, 72), (1, 650, 33)) if dtype != torch.float32 else ((1, 328, 33),)
    for batch, M, K in ((2, 96, 80), *wide):
        shape = (batch, K, M) if tall else (batch, M, K)
        x = normal(shape, dtype, device)
        check_xxt(compare, x.mT if tall else x)
        check_square(compare, symmetric(batch, M, dtype, device))


@pytest.mark.slow
@settings(
    max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=False
)
@given(
    batch=st.integers(1, 3), M=st.integers(1, 100), K=st.integers(1, 50),
    dtype=st.sampled_from(DTYPES), tall=st.booleans(), round_up=st.booleans(),
)  # fmt: skip
def test_any_size(compare, device, arch, batch, M, K, dtype, tall, round_up):
    """From one tile to 28, so that every place of the folded triangle is met."""
    if round_up:  # to sizes that descriptors can take
        M, K = -(-M // 8) * 8, -(-K // 8) * 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "tile", lambda *args: dict(SMALL))
        x = normal((batch, K, M) if tall else (batch, M, K), dtype, device)
        check_xxt(compare, x.mT if tall else x)
        check_square(compare, symmetric(batch, M, dtype, device))


def test_strides(compare, device, arch):
    """Columns of wider matrices, every other row, no unit stride at all, an odd address."""
    wide = normal((2, 40, 96), torch.bfloat16, device)
    for x in (wide[..., 8:72], wide[:, ::2, :64], wide[..., ::2], wide[..., 1:81], wide[:1]):
        check_xxt(compare, x)
        check_xxt(compare, x.mT)
    check_xxt(compare, wide[:1].expand(3, 40, 96))
    check_square(compare, symmetric(1, 40, torch.bfloat16, device).expand(2, 40, 40))


def test_tiles_are_mirrored(device):
    """Above the diagonal tiles stand copies, bit for bit."""
    y = xxt(normal((2, 150, 64), torch.bfloat16, device))
    for m in range(64, 150, 64):
        assert torch.equal(y[:, :m, m:], y[:, m:, :m].mT)


@broad("shape", [(40, 40), (33, 90), (90, 33), (2, 3, 24, 48), (2, 48, 24)], quick=(1, 3))
def test_newton_schulz_in_fp32(compare, device, arch, shape):
    g = normal(shape, torch.float32, device)
    compare([newton_schulz(g)], [REFERENCE.newton_schulz(g)], [REFERENCE.newton_schulz(g.double())])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@broad("shape", [(40, 40), (90, 33), (3, 64, 128), (2, 128, 64)], quick=(1,))
def test_newton_schulz_in_16_bits(compare, device, arch, dtype, shape):
    """Five rounded steps multiply their errors: the yardstick is the same iteration, rounded."""
    g = normal(shape, dtype, device)
    compare([newton_schulz(g)], [EAGER.newton_schulz(g)], [REFERENCE.newton_schulz(g.double())])


@pytest.mark.slow
def test_strides_scales_and_steps(compare, device):
    """A view; gradients that are tiny, or whose norm is above fp16's range; no step, one step."""
    g = normal((4, 24, 40), torch.float32, device)
    for x in (g[::2, :, 5:], g.mT, g * 1e-6, g.transpose(0, 1)):
        for steps in (0, 1, 5):
            results = [
                [op(t, steps)] for op, t in
                ((newton_schulz, x), (REFERENCE.newton_schulz, x),
                 (REFERENCE.newton_schulz, x.double()))
            ]  # fmt: skip
            compare(*results)
    large = (g * 1e4).half()
    y, truth = newton_schulz(large), REFERENCE.newton_schulz(large.double())
    compare([y], [EAGER.newton_schulz(g.half())], [truth])


def test_empty_and_zero(device, launches):
    """No matrix, no column, no row: no launch; zeros stay zero."""
    for shape in ((0, 4, 4), (2, 4, 0), (0, 3)):
        assert newton_schulz(torch.ones(shape, device=device)).shape == shape
    assert not launches
    assert torch.equal(xxt(torch.ones(1, 3, 0, device=device)), torch.zeros(1, 3, 3, device=device))
    zero = torch.zeros(2, 4, 6, device=device)
    assert torch.equal(newton_schulz(zero), zero)


def test_launches_and_repeats(device, launches):
    """Two launches a step, whatever the batch; twice the same bits; the input is left alone."""
    g = normal((3, 2, 40, 24), torch.bfloat16, device)
    before = g.clone()
    first, second = newton_schulz(g), newton_schulz(g, steps=5)
    assert launches == {"_symmetric_product_kernel": 20}
    assert torch.equal(first, second) and torch.equal(g, before) and first.is_contiguous()


@broad(
    ("old", "new"),
    [
        ("+ c * y", "- c * y"),
        ("if i != j:", "if i == j:"),
        ("EVEN_K=K % BLOCK_K == 0", "EVEN_K=True"),
        ("n * (n + 1) // 2\n", "n * (n + 1) // 2 - 1\n"),
        ("range(0, K, BLOCK_K)", "range(BLOCK_K, K, BLOCK_K)"),
        ("i = r - n % 2", "i = r"),
        ("tl.program_id(0) // tiles", "tl.program_id(0) // tiles * 0"),
    ],
    quick=(0, 5),
)
def test_a_broken_copy_is_seen(broken, compare, device, old, new):
    copy = broken(room, old, new)
    # Through pointers, with memory of ours behind the last column.
    x = normal((2, 190, 170), torch.float32, device)[..., :90]
    with pytest.raises(AssertionError):
        check_xxt(compare, x, copy.xxt)
        check_square(compare, symmetric(2, 190, torch.float32, device), copy.symmetric_square)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.baddbmm(x, p, x, beta=a)", "torch.baddbmm(x, p, x)"),
        ("torch.baddbmm(x, x, p, beta=a)", "torch.baddbmm(x, x, p, beta=a / 2)"),
        ("norm + 1e-7", "norm + 1"),
        ("range(steps)", "range(steps - 1)"),
    ],
)
def test_a_broken_iteration_is_seen(broken, compare, device, old, new):
    copy = broken(room, old, new)
    with pytest.raises(AssertionError):
        for shape in ((24, 40), (40, 24)):
            g = normal(shape, torch.float32, device)
            truth = REFERENCE.newton_schulz(g.double())
            compare([copy.newton_schulz(g)], [REFERENCE.newton_schulz(g)], [truth])


def test_refusals(device):
    for g in (torch.ones(4, device=device), torch.ones(4, 4, dtype=torch.float64, device=device)):
        with pytest.raises(ValueError, match="^g: "):
            newton_schulz(g)
    with pytest.raises(ValueError, match="^x: torch.float64"):
        xxt(torch.ones(1, 4, 4, dtype=torch.float64, device=device))


def test_opcheck(device):
    torch.library.opcheck(xxt, (normal((2, 20, 24), torch.float32, device),))
    s = symmetric(2, 20, torch.float32, device)
    torch.library.opcheck(symmetric_square, (s, B, C))


def test_compiled_whole(device):
    g = normal((2, 24, 40), torch.bfloat16, device)
    compiled = torch.compile(newton_schulz, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(g), newton_schulz(g))
