"""The output layer and its cross-entropy as PyTorch runs them fastest; eager.py hands this on."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.kernels._loss import backward, gain_of, kept_dtype, save

CHUNK = 1 << 20  # logits alive at a time on a CPU: what its caches hold; see benchmarks/
ROWS = 96  # but at least this number of rows, or the matrix products turn thin


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    *,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """As reference.linear_cross_entropy; the logits exist for one chunk of rows at a time.

    The gradients are made in the forward pass, while the logits of a chunk are there; what
    happens to them in the backward pass stands in _loss.py.
    Memory: one chunk of logits and its gradient, and dx, dw, instead of N V logits twice.
    Source: Wijmans et al. 2024, arXiv:2411.09009, for the aim; Hsu et al. 2024, arXiv:2410.10989,
    for gradients made in the forward pass.
    """
    train = torch.is_grad_enabled()
    trains = train and x.requires_grad, train and w.requires_grad
    return _eager_loss(x, w, targets, softcap, z_loss, ignore_index, *trains)[0]


@torch.library.custom_op("minillm::eager_linear_cross_entropy", mutates_args=())
def _eager_loss(
    x: Tensor, w: Tensor, targets: Tensor, softcap: float, z_loss: float, ignore_index: int,
    train_x: bool, train_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss; dx and dw as _loss.py has them, empty if not wanted; the count of rows."""
    (N, C), V = x.shape, w.shape[0]
    rows = max(ROWS, (CHUNK << (0 if x.device.type == "cpu" else 6)) // max(V, 1))
    wide = torch.promote_types(x.dtype, torch.float32)
    gain, wx = gain_of(x.dtype), w.to(x.dtype)
    dx = x.new_empty((N, C) if train_x else (0,), dtype=kept_dtype(x.dtype))
    dw = x.new_zeros((V, C) if train_w else (0,), dtype=wide)
    loss = x.new_zeros((), dtype=wide)
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        logits = F.linear(x[part], wx).to(wide)  # (rows, V)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        peak = logits.amax(-1, keepdim=True)
        p = (logits - peak).exp_()
        mass = p.sum(-1, keepdim=True)
        lse = peak + mass.log()
        valid = (targets[part] != ignore_index)[:, None]
        target = targets[part][:, None].where(valid, 0)
        each = lse - logits.gather(-1, target) + z_loss * lse.square()
        loss += torch.where(valid, each, 0).sum()
        if not (train_x or train_w):
            continue
        scale = valid.to(wide) * gain  # (rows, 1)
        dz = p.mul_(scale / mass * (1 + 2 * z_loss * lse))
        dz.scatter_add_(-1, target, -scale)
        if softcap:
            dz *= 1 - (logits / softcap).square()
        dz = dz.to(x.dtype)
        if train_x:
            dx[part] = _product(dz, wx)
        if train_w:
            _add_product(dw, dz.t(), x[part])
    count = (targets != ignore_index).sum()
    return loss / count, dx, dw, count


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, summed in fp32 (fp64 for fp64) and not rounded, but to bf16 of bf16 on a CPU.

    There fp32 products of bf16 numbers take twice the time, and no result is out of range.
    """
    if a.dtype not in (torch.float16, torch.bfloat16):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b if a.dtype == torch.bfloat16 else a.float() @ b.float()


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b; out is at least fp32."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out += _product(a, b)


@_eager_loss.register_fake
def _(x, w, targets, softcap, z_loss, ignore_index, train_x, train_w):
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = x.new_empty(x.shape if train_x else (0,), dtype=kept_dtype(x.dtype))
    dw = w.new_empty(w.shape if train_w else (0,), dtype=wide)
    return x.new_empty((), dtype=wide), dx, dw, targets.new_empty((), dtype=torch.int64)


_eager_loss.register_autograd(backward, setup_context=save)
