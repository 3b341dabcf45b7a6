"""Rotary position embedding for decoding, in Triton. Keys and values go into the cache."""

import torch
from torch import Tensor

from minillm.kernels._entrance import entrance
from minillm.kernels._launch import launch
from minillm.kernels._rope_kernels import (
    _rope_fwd_kernel,
    angles,
    check,
    contiguous,
    grid_of,
    heads_together,
)


@torch.library.custom_op("minillm::rope_cache", mutates_args=("cache_k", "cache_v"))
def _rope_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache_k: Tensor, cache_v: Tensor,
    positions: Tensor | None, position: int,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    (B, T, H, _), G = q.shape, k.shape[2]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = heads_together(q, k, v)
    cos, sin, *angle_strides = angles(cos, sin)
    grid, options = grid_of("fwd", q, k)
    norm = q_weight is not None
    launch(
        _rope_fwd_kernel, grid, q, k, v, cos, sin,
        q_weight if norm else q, k_weight if norm else k, q if positions is None else positions,
        q_out, cache_k, cache_v, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *cache_k.stride()[:3], *cache_v.stride()[:3], *angle_strides, position,
        B * T, T, cache_k.shape[1], H, G, eps, NORM=norm, CACHE=True,
        RAGGED=positions is not None, **options,
    )  # fmt: skip
    return q_out


@_rope_cache.register_fake
def _(q, k, v, cos, sin, cache_k, cache_v, positions, position, q_weight, k_weight, eps):
    return q.new_empty(q.shape)


@entrance(one_dtype=("q", "k"))
def rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    positions: Tensor | int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Apply `rope` to new tokens and write their keys and values into the cache, in one launch.

        cache_k[b, p_b + t] = k'[b, t];   cache_v[b, p_b + t] = v[b, t]

    q: queries, (B, T, H, D), fp32, fp16 or bf16, any strides, D even and up to 256
    k, v: keys and values, (B, T, G, D), k in q's dtype, any strides
    cos, sin: tables of the angles, (P, D/2), one row for each absolute position
    cache_k, cache_v: (B, S, G, D), S <= P, heads contiguous; written in place
    positions: p_b, the position of the first new token of row b: (B,), int32 or int64, or one int
        for all. A tensor is not checked, because that would wait for the device: a token beyond
        the cache is not written, and its q' is undefined
    q_weight, k_weight, eps: QK-norm, see `rope`

    Returns q', the rotated queries, (B, T, H, D), in q's dtype. There are no gradients.
    Raises ValueError on another dtype or shape.
    Cost: reads q, k and v once and writes them once.
    """
    check(q, k, cos, sin, q_weight, k_weight)
    _check_cache(k, v, cos, cache_k, cache_v)
    (B, T), S = q.shape[:2], cache_k.shape[1]
    if isinstance(positions, Tensor) and positions.dim() == 0:
        positions = positions.expand(B)
    if isinstance(positions, Tensor):
        if positions.shape != (B,) or positions.dtype not in (torch.int32, torch.int64):
            came = f"{tuple(positions.shape)} {positions.dtype}"
            raise ValueError(f"positions: {came}, expected ({B},) of int32 or int64")
        where = positions.contiguous(), 0
    else:
        if not 0 <= positions <= S - T:
            raise ValueError(f"positions: {positions}, expected 0 to {S - T}")
        where = None, positions
    weights = contiguous(q_weight, k_weight)
    return _rope_cache(q, k, v, cos, sin, cache_k, cache_v, *where, *weights, eps)


def _check_cache(k: Tensor, v: Tensor, cos: Tensor, cache_k: Tensor, cache_v: Tensor) -> None:
    """Raise ValueError, naming the argument, on shapes that do not fit those of k."""
    B, _, G, D = k.shape
    if v.shape != k.shape:
        raise ValueError(f"v: shape {tuple(v.shape)}, expected k's {tuple(k.shape)}")
    for name, x in {"cache_k": cache_k, "cache_v": cache_v}.items():
        if x.dim() != 4 or (x.shape[0], *x.shape[2:]) != (B, G, D) or x.stride(3) != 1:
            came = f"shape {tuple(x.shape)}, strides {x.stride()}"
            raise ValueError(f"{name}: {came}, expected ({B}, S, {G}, {D}) of contiguous heads")
    S = cache_k.shape[1]
    if cos.dim() != 2 or cos.shape[0] < S or cos.shape[1] != D // 2:
        raise ValueError(f"cos: shape {tuple(cos.shape)}, expected ({S} or more, {D // 2})")
