"""Tensors whose parts lie 2^31 numbers apart and more: no offset is cut to 32 bits.

Of the memory between nothing is touched; it costs addresses, not memory. Attention's own test of
descriptors and pointers stands in test_attention.py.
"""

import pytest
import torch
from torch import Tensor

from minillm.kernels.attention import attention
from minillm.kernels.decode_attention import decode_attention
from minillm.kernels.linear_cross_entropy import linear_cross_entropy
from minillm.kernels.newton_schulz import newton_schulz, xxt
from minillm.kernels.rms_norm import add_rms_norm, rms_norm
from minillm.kernels.rope import rope
from minillm.kernels.rope_cache import rope_cache
from minillm.kernels.sample import sample
from minillm.kernels.sandwich_norm import sandwich_norm
from minillm.kernels.swiglu import geglu, relu2, swiglu

FAR, HALF = (1 << 31) + 16, 1 << 30  # HALF overflows when it is taken twice
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[1] < 24 << 30, reason="16 GiB a tensor"
)


def far(shape: tuple[int, ...], strides: tuple[int, ...], device, seed: int = 0) -> Tensor:
    """bf16 normal numbers of this shape, so far apart."""
    last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    x = torch.tensor([], dtype=torch.bfloat16, device=device)
    x.set_(torch.UntypedStorage(2 * (last + 1), device=device), 0, shape, strides)
    return x.copy_(near(shape, device, seed))


def near(shape: tuple[int, ...], device, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device).bfloat16()


def angles(device, T: int = 20, half: int = 16) -> dict[str, Tensor]:
    cos, sin = near((2, T, half), device).float()
    return {"cos": cos, "sin": sin}


def check(op, tensors: dict[str, Tensor], grad: bool = True, **others) -> None:
    """Values and gradients are those of the same numbers close together."""
    found = []
    for copy in (lambda x: x, lambda x: x.contiguous()):
        leaves = {n: copy(x.detach()).requires_grad_(grad) for n, x in tensors.items()}
        y = op(**leaves, **others)
        results = [y] if isinstance(y, Tensor) else list(y)
        if grad:
            loss = sum(t.float().sin().sum() for t in results)
            results += torch.autograd.grad(loss, list(leaves.values()))
        found.append([t.detach() for t in results])
    for y, z in zip(*found, strict=True):
        torch.testing.assert_close(y, z, rtol=0.02, atol=0.02)


def rows(device, seed: int = 0) -> Tensor:
    return far((2, 32), (FAR, 1), device, seed)


def heads(device, H: int, seed: int = 0) -> Tensor:
    """(1, 20, H, 32), a head 2^30 numbers behind the other."""
    return far((1, 20, H, 32), (20 * 32, 32, HALF, 1), device, seed)


def test_norms(device):
    w = {"w": torch.ones(32, device=device)}
    check(rms_norm, {"x": rows(device), **w})
    check(add_rms_norm, {"x": rows(device), "residual": rows(device, 2), **w})
    both = {"w_post": w["w"], "w_pre": w["w"]}
    check(sandwich_norm, {"x": rows(device), "residual": rows(device, 2), **both})


@pytest.mark.parametrize("op", [swiglu, geglu, relu2], ids=lambda op: op.__name__)
def test_activations(device, op):
    check(op, {"x": rows(device)})


def test_attention(device):
    check(attention, {"q": heads(device, 3), "k": heads(device, 3, 2), "v": heads(device, 3, 3)})


@pytest.mark.parametrize("norm", [False, True])
def test_rope(device, norm):
    """Heads far apart, then rows of a batch; incoming gradients lie as the outputs do."""
    weights = dict.fromkeys(("q_weight", "k_weight"), torch.ones(32, device=device)) if norm else {}
    check(rope, {"q": heads(device, 3), "k": heads(device, 3, 2), **weights}, **angles(device))
    q, k = (far((2, 20, 1, 32), (FAR, 32, 32, 1), device, seed) for seed in (0, 2))
    check(rope, {"q": q, "k": k, **weights}, **angles(device))


def test_gradients_of_rope(device):
    """Far apart themselves: heads 2^30 numbers behind each other."""
    q, k = (near((1, 20, 3, 32), device, seed).requires_grad_() for seed in (0, 2))
    y = rope(q, k, **angles(device))
    dy = heads(device, 3, 4), heads(device, 3, 5)
    ours = torch.autograd.grad(y, (q, k), dy, retain_graph=True)
    clean = torch.autograd.grad(y, (q, k), [d.contiguous() for d in dy])
    assert all(torch.equal(a, b) for a, b in zip(ours, clean, strict=True))


def test_into_a_cache(device):
    q, k, v = (near((1, 2, 3, 32), device, seed) for seed in (0, 2, 3))
    found = []
    for copy in (lambda x: x, lambda x: x.contiguous()):
        caches = [copy(heads(device, 3, seed)) for seed in (4, 5)]
        y = rope_cache(q, k, v, **angles(device), cache_k=caches[0], cache_v=caches[1], positions=7)
        found.append([y, *caches])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_decode_attention(device):
    q = near((1, 1, 6, 32), device)
    check(decode_attention, {"q": q, "k": heads(device, 3), "v": heads(device, 3, 2)}, grad=False)
    q = near((2, 1, 2, 32), device)
    k, v = (far((2, 20, 1, 32), (FAR, 32, 32, 1), device, seed) for seed in (0, 2))
    check(decode_attention, {"q": q, "k": k, "v": v}, grad=False)


def test_head_and_sampling(device):
    w, targets = near((50, 32), device), torch.tensor([3, 7], device=device)
    check(linear_cross_entropy, {"x": rows(device), "w": w}, targets=targets)
    u = torch.tensor([0.3, 0.8], device=device)
    check(sample, {"logits": rows(device)}, grad=False, uniform=u, top_k=5)


def test_newton_schulz(device):
    check(newton_schulz, {"g": far((2, 16, 32), (FAR, 32, 1), device)}, grad=False)
    check(xxt, {"x": far((1, 3, 32), (1 << 33, HALF, 1), device)}, grad=False)
