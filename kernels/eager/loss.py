"""Output layer and cross-entropy in chunks of rows; kernels/reference/loss.py defines them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.kernels._entrance import differentiable, entrance, wants_gradient
from minillm.kernels._loss import backward, gain_of, kept_dtype, save

CHUNK = 1 << 20  # logits in memory at a time on a CPU: as many as its caches hold; benchmarks/
ROWS = 96  # fewest rows of a chunk: with fewer, matrix products are slow


@entrance(narrowed=("x",))
def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    *,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Return the mean cross-entropy of the targets under x w^T, one chunk of rows at a time.

    The forward pass computes the gradients too, while it has the logits of a chunk. _loss.py says
    what the backward pass does with them.
    Memory: one chunk of logits and its gradient, and dx, dw, instead of N V logits twice.

    x: hidden states, (N, C)
    w: weight of the output layer, (V, C)
    targets: right token of each row, (N,), int64
    softcap: bound of the logits (0: none)
    z_loss: weight of the squared log-sum-exp
    ignore_index: target of rows that do not count

    Returns (), in at least fp32.
    Source: Wijmans et al. 2024, arXiv:2411.09009, for the aim; Hsu et al. 2024, arXiv:2410.10989,
    for gradients made in the forward pass.
    """
    trains = wants_gradient(x), wants_gradient(w)
    return _mean_loss(x, w, targets, softcap, z_loss, ignore_index, *trains)[0]


@torch.library.custom_op("minillm::eager_linear_cross_entropy", mutates_args=())
def _eager_loss(
    x: Tensor, w: Tensor, targets: Tensor, softcap: float, z_loss: float, ignore_index: int,
    train_x: bool, train_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss, dx and dw (empty where not wanted), and the number of rows that count."""
    (N, C), V = x.shape, w.shape[0]
    on_cpu = x.device.type == "cpu"
    rows = max(ROWS, (CHUNK if on_cpu else CHUNK << 6) // max(V, 1))
    wide = torch.promote_types(x.dtype, torch.float32)
    gain, wx = gain_of(x.dtype), w.to(x.dtype)
    w_logits = wx if _is_narrow_on_gpu(x) else w.to(wide)
    dx = x.new_empty((N, C) if train_x else (0,), dtype=kept_dtype(x.dtype))
    dw = x.new_zeros((V, C) if train_w else (0,), dtype=wide)
    loss = x.new_zeros((), dtype=wide)
    counts = targets != ignore_index
    count = counts.sum()
    # Where every factor of a row is 1 the product is left out; on a GPU the check would wait.
    factors = z_loss or gain != 1 or not on_cpu or int(count) < N
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        valid = counts[part, None]  # (rows, 1)
        target = targets[part, None].where(valid, 0)
        # Rows that do not count may hold nan, and 0 times nan would reach dw.
        xs = x[part].masked_fill(~valid, 0) if factors else x[part]
        logits = _logits(xs, w_logits)  # (rows, V)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        # One exponential a logit: the largest p is 1 / mass.
        peak, picked = logits.amax(-1, keepdim=True), logits.gather(-1, target)
        p = logits.softmax(-1)
        spread = -p.amax(-1, keepdim=True).log()  # lse - peak
        each = (peak - picked) + spread
        if z_loss:
            each += z_loss * (peak + spread).square()
        loss += torch.where(valid, each, 0).sum()
        if not (train_x or train_w):
            continue
        scale = valid.to(wide) * gain
        if factors:
            p.mul_(scale * (1 + 2 * z_loss * (peak + spread)) if z_loss else scale)
        dz = p.scatter_add_(-1, target, -scale)
        if softcap:
            dz *= 1 - (logits / softcap).square()
        dz = dz.to(x.dtype)
        if train_x:
            dx[part] = _product(dz, wx)
        if train_w:
            _add_product(dw, dz.t(), xs)
    return loss / count, dx, dw, count


def _is_narrow_on_gpu(x: Tensor) -> bool:
    """Return whether PyTorch can keep products of these 16-bit numbers in fp32."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _logits(x: Tensor, w: Tensor) -> Tensor:
    """Return x w^T, summed and kept in at least fp32; w is in that dtype, or on a GPU in x's.

    Rounded to bf16, a logit of 10 would be off by up to 0.03, and its probability by 3 %.
    """
    if _is_narrow_on_gpu(x):
        return torch.mm(x, w.t(), out_dtype=torch.float32)
    return F.linear(x.to(w.dtype), w)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b, summed in fp32 (fp64 for fp64) and not rounded; on a CPU bf16 stays bf16.

    There fp32 products of bf16 numbers take twice the time, and no result is out of range.
    """
    if _is_narrow_on_gpu(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float() if a.dtype == torch.float16 else a @ b


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to out, which is in at least fp32."""
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


_mean_loss = differentiable(_eager_loss, save, backward)
