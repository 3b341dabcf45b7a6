"""Causal attention in Triton, forward and backward, that never writes a score to memory.

Blocks that nobody sees are skipped, before a window as beyond the diagonal and between documents.
The kernels are in _attention_forward.py and _attention_backward.py.
"""

import math

import torch
from torch import Tensor

from minillm.kernels._attention_backward import backward
from minillm.kernels._attention_blocks import Rule, padded
from minillm.kernels._attention_forward import forward
from minillm.kernels._entrance import differentiable, entrance, last
from minillm.kernels._launch import DTYPES

WIDEST = 128  # columns of a head: what the tables of tiles end with


@torch.library.custom_op("minillm::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, slopes: Tensor | None,
    scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return forward(q, k, v, Rule(scale, window, softcap, starts, slopes))


@_attention.register_fake
def _(q, k, v, starts, slopes, scale, window, softcap):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op("minillm::attention_bwd", mutates_args=())
def _attention_bwd(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, dy: Tensor,
    starts: Tensor | None, slopes: Tensor | None, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(q, k, v, y, lse, dy, Rule(scale, window, softcap, starts, slopes))


@_attention_bwd.register_fake
def _(q, k, v, y, lse, dy, starts, slopes, scale, window, softcap):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_gradients = last(_attention_bwd)


def _save(ctx, inputs, output) -> None:
    q, k, v, starts, slopes, *ctx.numbers = inputs
    y, lse = output
    ctx.save_for_backward(q, k, v, y, lse, starts, slopes)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, dy, _):
    q, k, v, y, lse, starts, slopes = ctx.saved_tensors
    grads = _gradients(q, k, v, y, lse, dy, starts, slopes, *ctx.numbers)
    return *grads, None, None, None, None, None


_flash = differentiable(_attention, _save, _backward)


@entrance(narrowed=("q", "k", "v"))
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int = 0,
    documents: Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """As reference.attention.

        y_i = sum_j softmax_j(s_ij) v_j,   s_ij = cap(scale q_i.k_j) - slope (i - j),   j <= i

    q: (B, T, H, D).    k, v: (B, T, G, D), G divides H. One dtype of fp32, fp16 and bf16, any
    strides; without a copy if heads are contiguous, so slices of one (B, T, H + 2G, D) do.
    D up to 128; the products are of the next power of two, but no memory is read for the rest.
    scale: above 0.    documents: (B, T) integers that never fall along T.    alibi_slopes: (H,).
    Returns (B, T, H, D) in q's dtype; gradients dq, dk, dv in theirs; sums, scores and softmax are
    fp32, probabilities enter the second product in q's dtype. In fp16 and bf16 a capped score
    errs by up to 2e-7 softcap. There is no gradient for slopes.
    Raises ValueError if D is above 128, on dropout, or on another dtype, shape or range.
    Forward: 4 D flops a pair seen, reads q and writes y once, k and v once a block of queries.
    Backward: 14 D. Saves q, k, v, y and B H T fp32.
    Source: Dao 2023, arXiv:2307.08691, algorithms 1 and 2; ALiBi: Press et al. 2021,
    arXiv:2108.12409.
    """
    scale = _checked(q, k, v, scale, window, documents, softcap, alibi_slopes, dropout)
    starts = slopes = None
    if documents is not None:
        documents = documents.contiguous()
        starts = torch.searchsorted(documents, documents, out_int32=True)
    if alibi_slopes is not None:
        slopes = alibi_slopes.detach().float().contiguous()
    window = window if window < q.shape[1] else 0
    return _flash(q, k, v, starts, slopes, scale, window, float(softcap))[0]


def _checked(q, k, v, scale, window, documents, softcap, alibi_slopes, dropout) -> float:
    """The scale; ValueError, naming the argument, unless the kernels can take these."""
    if q.dim() != 4 or not 1 <= q.shape[3] <= WIDEST or not q.shape[2]:
        wanted = f"(B, T, H, D) with H above 0 and D from 1 to {WIDEST}"
        raise ValueError(f"q: {tuple(q.shape)}, expected {wanted}")
    B, T, H, D = q.shape
    rows = B * H * padded(T)  # what lse and delta are indexed by
    if rows >= 1 << 31:
        raise ValueError(f"q: {tuple(q.shape)} is {rows} rows, expected fewer than 2^31")
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise ValueError(f"{name}: {x.dtype}, expected one of {DTYPES}, the same for q, k, v")
    if k.dim() != 4 or k.shape != (B, T, k.shape[2], D) or not k.shape[2] or H % k.shape[2]:
        wanted = f"({B}, {T}, G, {D}) with G a divisor of {H}"
        raise ValueError(f"k: shape {tuple(k.shape)}, expected {wanted}")
    if v.shape != k.shape:
        raise ValueError(f"v: shape {tuple(v.shape)}, expected k's {tuple(k.shape)}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale: {scale}, expected a number above 0")
    if window < 0:
        raise ValueError(f"window: {window}, expected 0 or more")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: {softcap}, expected 0 or more")
    if dropout:
        raise ValueError(f"dropout: {dropout}, expected 0: the kernel has none")
    if documents is not None:
        integers = not (documents.is_floating_point() or documents.is_complex())
        if documents.shape != (B, T) or documents.dtype == torch.bool or not integers:
            came = f"{tuple(documents.shape)} {documents.dtype}"
            raise ValueError(f"documents: {came}, expected ({B}, {T}) integers")
    if alibi_slopes is not None:
        if alibi_slopes.shape != (H,) or not alibi_slopes.is_floating_point():
            came = f"{tuple(alibi_slopes.shape)} {alibi_slopes.dtype}"
            raise ValueError(f"alibi_slopes: {came}, expected ({H},) floats")
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise ValueError("alibi_slopes: wants a gradient, which the kernel does not compute")
    return 1 / math.sqrt(D) if scale is None else float(scale)
