"""Causal attention in Triton, forward and backward, that never writes a score to memory.

It skips blocks of scores that no query sees: those before a window, beyond the diagonal and between
documents. The kernels are in _attention_forward.py and _attention_backward.py.
"""

import torch
from torch import Tensor

from minillm.kernels._attention_backward import backward
from minillm.kernels._attention_blocks import Rule
from minillm.kernels._attention_checks import check_heads, check_scores
from minillm.kernels._attention_forward import forward
from minillm.kernels._entrance import differentiable, entrance, last


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
    """Return the causal attention of T queries over the same T positions.

        y_i = sum_j softmax_j(s_ij) v_j,   s_ij = cap(scale q_i.k_j) - slope (i - j),   j <= i
        cap(x) = softcap tanh(x / softcap), or x where softcap is 0

    q: queries, (B, T, H, D), fp32, fp16 or bf16, D up to 128, any strides. Tensors are copied only
        if heads are not contiguous, so q, k and v may be slices of one (B, T, H + 2G, D)
    k, v: keys and values, (B, T, G, D), in q's dtype; G divides H
    scale: factor of the scores, above 0 (None: 1/sqrt(D))
    window: each query sees only keys with i - j < window (0: all)
    documents: number of the document of each position, (B, T), integers that never fall along T;
        a query sees only keys of the same document
    softcap: bound of the scores (0: none); in fp16 and bf16 a capped score is off by up to
        2e-7 softcap
    alibi_slopes: slope of each query head, (H,), any float dtype; they get no gradient
    dropout: must be 0

    Returns y, (B, T, H, D), in q's dtype. Scores, softmax and sums are fp32; probabilities are
    rounded to q's dtype before they are multiplied by v. Gradients dq, dk, dv have the dtypes of
    q, k, v.
    Raises ValueError if D is above 128, on dropout, or on another dtype, shape or range.
    Cost: forward 4 D FLOPs for each pair seen, backward 14 D. The forward pass reads q and writes y
    once, and reads k and v once for each block of queries. It saves q, k, v, y and B H T fp32.
    Source: Dao 2023, arXiv:2307.08691, algorithms 1 and 2; ALiBi: Press et al. 2021,
    arXiv:2108.12409.
    """
    check_heads(q, k, v, over_cache=False)
    scale = check_scores(q, scale, window, softcap, alibi_slopes)
    _check(q, documents, alibi_slopes, dropout)
    starts = slopes = None
    if documents is not None:
        documents = documents.contiguous()
        starts = torch.searchsorted(documents, documents, out_int32=True)
    if alibi_slopes is not None:
        slopes = alibi_slopes.detach().float().contiguous()
    window = window if window < q.shape[1] else 0
    return _flash(q, k, v, starts, slopes, scale, window, float(softcap))[0]


def _check(q: Tensor, documents: Tensor | None, slopes: Tensor | None, dropout: float) -> None:
    """Raise ValueError on arguments that only this operation has, or only it must refuse."""
    B, T, H, _ = q.shape
    if dropout:
        raise ValueError(f"dropout: {dropout}, expected 0: the kernel has none")
    if documents is not None:
        integers = not (documents.is_floating_point() or documents.is_complex())
        if documents.shape != (B, T) or documents.dtype == torch.bool or not integers:
            came = f"{tuple(documents.shape)} {documents.dtype}"
            raise ValueError(f"documents: {came}, expected ({B}, {T}) integers")
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes: needs a gradient, which the kernel does not compute")
