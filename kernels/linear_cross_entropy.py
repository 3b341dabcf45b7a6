"""Output layer and cross-entropy in Triton: the logits exist for one chunk of rows at a time.

For each chunk cuBLAS computes the logits, one Triton kernel with a program for each row computes
the loss and the gradient of the logits, and two more products give dx and dw. The forward pass
computes the gradients, while it has the logits of a chunk, and the backward pass only multiplies
them by a number. Nothing waits for the device, and no sum depends on the order of the programs.

Precision: logits are fp32. In bf16 they would take half the bytes, but the error of the loss would
be 27 to 450 times what the tests allow (dx and dw pass either way). Only the gradient of the logits
is rounded to x's dtype, for its products. It is kept without the factor 1 / rows, so that fp16
holds it. That factor is applied in fp32 at the end, see _loss.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels._entrance import differentiable, entrance, wants_gradient
from minillm.kernels._launch import DTYPES, launch, tile
from minillm.kernels._loss import backward, gain_of, kept_dtype, save
from minillm.kernels._tanh import tanh

CHUNK = 1 << 27  # logits in memory at a time: 512 MiB in fp32, and 256 MiB of bf16 gradients
# Fewest rows of a chunk: each chunk reads and writes the fp32 dw once, and its dx, (rows, C), needs
# enough tiles for all multiprocessors.
ROWS = 1024
ALIGNMENT = 16  # rows of a chunk start at multiples of this many numbers, for any V


@triton.jit
def _cap(x, softcap, CAPPED: tl.constexpr):
    return softcap * tanh(x / softcap, True) if CAPPED else x


@triton.jit
def _linear_cross_entropy_kernel(
    logits_ptr, dlogits_ptr, targets_ptr, losses_ptr, stride, V, softcap, z_loss, ignore_index,
    gain, CAPPED: tl.constexpr, Z_LOSS: tl.constexpr, TRAIN: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # Masks end at `stride`, a multiple of 16, so that rows of any V are read 16 bytes at a time.
    # The columns between V and `stride` are no logits and are replaced after the load.
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logits_ptr += row * stride
    dlogits_ptr += row * stride
    block = tl.arange(0, BLOCK_V)
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if TRAIN:
            zeros = tl.zeros([BLOCK_V], dlogits_ptr.dtype.element_ty)
            for start in range(0, V, BLOCK_V):
                tl.store(dlogits_ptr + start + block, zeros, mask=start + block < stride)
    else:
        inside = (target >= 0) & (target < V)
        picked = tl.load(logits_ptr + target, mask=inside, other=float("nan"))
        peak = -float("inf")
        masses = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, V, BLOCK_V):
            columns = start + block
            z = tl.load(logits_ptr + columns, mask=columns < stride, other=0.0)
            z = tl.where(columns < V, _cap(z, softcap, CAPPED), -float("inf"))
            higher = tl.maximum(peak, tl.max(z, 0))
            masses = masses * tl.exp(peak - higher) + tl.exp(z - higher)
            peak = higher
        mass = tl.sum(masses, 0)
        lse = peak + tl.log(mass)
        # Not lse - picked: the small loss of a confident row would lose its digits.
        loss = (peak - _cap(picked, softcap, CAPPED)) + tl.log(mass)
        if Z_LOSS:  # else 0 lse^2 would be nan for lse above 1.8e19, whose square is infinite
            loss += z_loss * lse * lse
        tl.store(losses_ptr + row, loss)
        if TRAIN:
            scale = tl.where(inside, gain / mass, float("nan"))
            for start in range(0, V, BLOCK_V):
                columns = start + block
                z = tl.load(logits_ptr + columns, mask=columns < stride, other=0.0)
                z = _cap(z, softcap, CAPPED)
                p = tl.exp(z - peak) * scale
                dz = p - tl.where(columns == target, gain, 0.0)
                if Z_LOSS:
                    dz += p * (2 * z_loss * lse)
                if CAPPED:
                    dz *= 1 - (z / softcap) * (z / softcap)
                dz = tl.where(columns < V, dz, 0.0).to(dlogits_ptr.dtype.element_ty)
                tl.store(dlogits_ptr + columns, dz, mask=columns < stride)


def _product(out: Tensor, a: Tensor, b: Tensor, beta: int = 0) -> None:
    """Compute out = beta out + a b; out and all sums are fp32 for any dtype of a and b.

    On a CPU, where kernels are only interpreted, sums are fp64, so that rounding in the order in
    which a CPU adds cannot hide or imitate an error of the kernel.
    """
    if not a.is_cuda:
        out.copy_(torch.addmm(out.double(), a.double(), b.double(), beta=beta))
    elif a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=beta, out=out)
    else:
        torch.addmm(out, a, b, beta=beta, out_dtype=torch.float32, out=out)


@torch.library.custom_op("minillm::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, w: Tensor, targets: Tensor, softcap: float, z_loss: float, ignore_index: int,
    train_x: bool, train_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss, dx and dw (empty where not wanted), and the number of rows that count."""
    (N, C), V, device = x.shape, w.shape[0], x.device
    train = train_x or train_w
    rows = min(N, max(ROWS, CHUNK // max(V, 1) // 128 * 128))
    stride = triton.cdiv(V, ALIGNMENT) * ALIGNMENT
    logits = torch.empty((rows, stride), dtype=torch.float32, device=device)
    dlogits = logits
    if train and x.dtype != torch.float32:
        dlogits = torch.empty((rows, stride), dtype=x.dtype, device=device)
    product = torch.empty((rows if train_x else 0, C), dtype=torch.float32, device=device)
    dx = torch.empty((N, C) if train_x else (0,), dtype=kept_dtype(x.dtype), device=device)
    dw = torch.zeros((V, C) if train_w else (0,), dtype=torch.float32, device=device)
    losses = torch.empty(N, dtype=torch.float32, device=device)
    targets = targets.contiguous()
    wx = w.to(x.dtype)
    for start in range(0, N, rows or 1):
        part = slice(start, min(start + rows, N))
        size = part.stop - start
        z, dz = logits[:size, :V], dlogits[:size, :V]  # (size, V), rows `stride` apart
        # Rows that do not count may hold nan, and 0 times nan would reach dw.
        rows_x = x[part].masked_fill((targets[part] == ignore_index)[:, None], 0)
        _product(z, rows_x, wx.t())
        launch(
            _linear_cross_entropy_kernel, (size,), z, dz, targets[part], losses[part], stride, V,
            softcap, z_loss, ignore_index, gain_of(x.dtype), CAPPED=softcap != 0,
            Z_LOSS=z_loss != 0, TRAIN=train,
            **tile("linear_cross_entropy", "row", V),
        )  # fmt: skip
        if train_x:
            # Not directly into dx: if cuBLAS splits V, it adds partial sums in the dtype of dx.
            _product(product[:size], dz, wx)
            dx[part].copy_(product[:size])
        if train_w:
            _product(dw, dz.t(), rows_x, beta=1)
    count = (targets != ignore_index).sum()
    loss = (losses.sum(dtype=torch.float64) / count).float()
    return loss, dx, dw, count


@_linear_cross_entropy.register_fake
def _(x, w, targets, softcap, z_loss, ignore_index, train_x, train_w):
    dx = x.new_empty(x.shape if train_x else (0,), dtype=kept_dtype(x.dtype))
    dw = w.new_empty(w.shape if train_w else (0,), dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), dx, dw, targets.new_empty((), dtype=torch.int64)


_mean_loss = differentiable(_linear_cross_entropy, save, backward)


def _refuse(x: Tensor, w: Tensor, targets: Tensor) -> None:
    """Raise ValueError, naming the argument, on shapes and dtypes that the kernel cannot take."""
    for name, t in (("x", x), ("w", w)):
        if t.dtype not in DTYPES:
            raise ValueError(f"{name}: {t.dtype}, expected one of {DTYPES}")
        if t.dim() != 2 or t.shape[1] != x.shape[-1]:
            shapes = f"x {tuple(x.shape)}, w {tuple(w.shape)}"
            raise ValueError(f"{name}: {shapes}, expected (N, C) and (V, C)")
    if targets.dtype != torch.int64 or targets.shape != x.shape[:1]:
        came = f"{targets.dtype} {tuple(targets.shape)}"
        raise ValueError(f"targets: {came}, expected torch.int64 ({x.shape[0]},)")


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
    """Return the mean cross-entropy, in nats, of the targets under the logits x w^T.

        z = cap(x w^T);   loss = mean_n [ lse(z_n) - z_n[target_n] + z_loss lse(z_n)^2 ]
        cap(z) = softcap tanh(z / softcap), or z where softcap is 0

    x: hidden states, (N, C), fp32, fp16 or bf16
    w: weight of the output layer, (V, C), fp32, fp16 or bf16; it is cast once to x's dtype, in
        which products are made; sums are fp32
    targets: right token of each row, (N,), int64
    softcap: bound of the logits (0: none)
    z_loss: weight of the squared log-sum-exp
    ignore_index: target of rows that do not count

    Returns (), fp32; nan if no row counts, or if a target that counts is outside [0, V).
    Gradients: dx in x's dtype and dw in w's, summed over all chunks in fp32. There is no second
    derivative. A tensor that needs no gradient costs none.
    Raises ValueError on other dtypes or shapes.
    Cost: three products of 2 N C V FLOPs, or one without gradients. Memory: one chunk of logits and
    its gradient, 6 bytes for each logit (4 in fp32), dx, dw, and dw once more in fp32. Each logit
    is written once and read twice, the second time soon after the first.
    Source: Wijmans et al. 2024, arXiv:2411.09009, for the aim; Hsu et al. 2024, arXiv:2410.10989,
    for gradients made in the forward pass.
    """
    _refuse(x, w, targets)
    trains = wants_gradient(x), wants_gradient(w)
    return _mean_loss(x, w, targets, softcap, z_loss, ignore_index, *trains)[0]
