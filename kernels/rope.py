"""Rotary position embedding in Triton, after the QK-norm: queries and keys in one launch.

rope_cache.py has the same operation while decoding. The kernels are in _rope_kernels.py.
"""

import torch
import triton
from torch import Tensor

from minillm.kernels._entrance import differentiable, entrance, last
from minillm.kernels._launch import launch
from minillm.kernels._rope_kernels import (
    _rope_bwd_kernel,
    _rope_fwd_kernel,
    angles,
    check,
    contiguous,
    grid_of,
    heads_together,
)


@torch.library.custom_op("minillm::rope", mutates_args=())
def _rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, H, _), G = q.shape, k.shape[2]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q, k = heads_together(q, k)
    cos, sin, *angle_strides = angles(cos, sin)
    grid, options = grid_of("fwd", q, k)
    norm = q_weight is not None
    launch(
        _rope_fwd_kernel, grid, q, k, k, cos, sin, q_weight if norm else q, k_weight if norm else k,
        q, q_out, k_out, k_out, *q.stride()[:3], *k.stride()[:3], *k.stride()[:3],
        *k_out.stride()[:3], *k_out.stride()[:3], *angle_strides, 0, B * T, T, T, H, G, eps,
        NORM=norm, CACHE=False, RAGGED=False, **options,
    )  # fmt: skip
    return q_out, k_out


@_rope.register_fake
def _(q, k, cos, sin, q_weight, k_weight, eps):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("minillm::rope_bwd", mutates_args=())
def _rope_bwd(
    dq_out: Tensor, dk_out: Tensor, q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk and the gradients of the weights; without weights these are (0,)."""
    (B, T, H, D), G = dq_out.shape, dk_out.shape[2]
    q, k = dq_out if q is None else q, dk_out if k is None else k
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (dq_out, dk_out))
    dq_out, dk_out, q, k = heads_together(dq_out, dk_out, q, k)
    cos, sin, *angle_strides = angles(cos, sin)
    grid, options = grid_of("bwd", q, k)
    norm = q_weight is not None
    of_q = triton.cdiv(H, options["HEADS"])
    dw = torch.empty((grid[1], grid[0] if norm else 0, D), dtype=torch.float32, device=q.device)
    launch(
        _rope_bwd_kernel, grid, dq_out, dk_out, q, k, cos, sin,
        q_weight if norm else q, k_weight if norm else k, dq, dk, dw,
        *dq_out.stride()[:3], *dk_out.stride()[:3], *q.stride()[:3], *k.stride()[:3],
        *angle_strides, B * T, T, H, G, eps, NORM=norm, **options,
    )  # fmt: skip
    if not norm:
        return dq, dk, dw.new_empty(0), dw.new_empty(0)
    dq_weight = dw[:of_q].sum((0, 1)).to(q_weight.dtype)
    return dq, dk, dq_weight, dw[of_q:].sum((0, 1)).to(k_weight.dtype)


@_rope_bwd.register_fake
def _(dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, eps):
    weights = [
        dq_out.new_empty(0, dtype=torch.float32) if w is None else w.new_empty(w.shape)
        for w in (q_weight, k_weight)
    ]
    return dq_out.new_empty(dq_out.shape), dk_out.new_empty(dk_out.shape), *weights


_gradients = last(_rope_bwd)


def _save(ctx, inputs, output) -> None:
    q, k, *rest, ctx.eps = inputs
    norm = rest[-1] is not None  # without the norm, rotating back needs only the angles
    ctx.save_for_backward(q if norm else None, k if norm else None, *rest)


def _backward(ctx, dq_out, dk_out):
    q, k, cos, sin, q_weight, k_weight = ctx.saved_tensors
    dq, dk, *weights = _gradients(dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, ctx.eps)
    weights = (None, None) if q_weight is None else weights
    return dq, dk, None, None, *weights, None


_rotate = differentiable(_rope, _save, _backward)


@entrance(one_dtype=("q", "k"))
def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Rotate the halves of each head by the angles of its position; with weights, norm heads first.

        [y1, y2] = [x1 cos - x2 sin, x2 cos + x1 sin],   x = [x1, x2];   dx rotates dy back

    q: queries, (B, T, H, D), fp32, fp16 or bf16, any strides, D even and up to 256
    k: keys, (B, T, G, D), in q's dtype, any strides
    cos, sin: tables of the angles, (T, D/2), or (B, T, D/2) where rows differ
    q_weight, k_weight: weights of the QK-norm, an RMSNorm of each head, (D,); both or neither
    eps: added to the mean square in the QK-norm

    Returns q and k, rotated, contiguous, in their dtypes. Nothing is rounded between norm and
    rotation. Gradients dq and dk have the dtypes of q and k; those of the weights are summed in
    fp32. cos and sin get none.
    Raises ValueError on another dtype or shape.
    Cost: forward 2 B T (H + G) D numbers, backward the same, or with the norm half as much again to
    read q and k. Saves the angles and, with the norm, q, k and the weights.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34; QK-norm: Henry et al. 2020, arXiv:2010.04245.
    """
    check(q, k, cos, sin, q_weight, k_weight)
    B, T, _, D = q.shape
    if cos.shape not in ((T, D // 2), (B, T, D // 2)):
        wanted = f"({T}, {D // 2}) or ({B}, {T}, {D // 2})"
        raise ValueError(f"cos: shape {tuple(cos.shape)}, expected {wanted}")
    return _rotate(q, k, cos, sin, *contiguous(q_weight, k_weight), eps)
