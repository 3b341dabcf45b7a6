"""Checks of the arguments that attention and decode_attention share."""

import math

from torch import Tensor

from minillm.kernels._attention_blocks import padded
from minillm.kernels._launch import DTYPES

WIDEST = 128  # head width


def check_heads(q: Tensor, k: Tensor, v: Tensor, over_cache: bool) -> None:
    """Raise ValueError, naming the argument, unless the kernels can take q, k and v.

    q: queries, which must be (B, T, H, D) with D up to WIDEST
    k, v: keys and values, which must be (B, S, G, D) with G a divisor of H, in q's dtype
    over_cache: S may be any number of keys; otherwise it must be T, and q is limited in size
    """
    if q.dim() != 4 or not 1 <= q.shape[3] <= WIDEST or not q.shape[2]:
        wanted = f"(B, T, H, D) with H above 0 and D from 1 to {WIDEST}"
        raise ValueError(f"q: {tuple(q.shape)}, expected {wanted}")
    B, T, H, D = q.shape
    rows = B * H * padded(T)  # lse and delta of attention have one number for each
    if rows >= 1 << 31 and not over_cache:
        raise ValueError(f"q: {tuple(q.shape)} is {rows} rows, expected fewer than 2^31")
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise ValueError(f"{name}: {x.dtype}, expected one of {DTYPES}, the same for q, k, v")
    fits = k.dim() == 4 and (k.shape[0], k.shape[3]) == (B, D) and (over_cache or k.shape[1] == T)
    if not fits or not k.shape[2] or H % k.shape[2]:
        wanted = f"({B}, {'S' if over_cache else T}, G, {D}) with G a divisor of {H}"
        raise ValueError(f"k: shape {tuple(k.shape)}, expected {wanted}")
    if v.shape != k.shape:
        raise ValueError(f"v: shape {tuple(v.shape)}, expected k's {tuple(k.shape)}")


def check_scores(
    q: Tensor, scale: float | None, window: int, softcap: float, alibi_slopes: Tensor | None
) -> float:
    """Return the scale; raise ValueError, naming the argument, on a number out of range.

    q: queries, (B, T, H, D)
    scale, window, softcap, alibi_slopes: see `attention`
    """
    H, D = q.shape[2:]
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale: {scale}, expected a number above 0")
    if window < 0:
        raise ValueError(f"window: {window}, expected 0 or more")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: {softcap}, expected 0 or more")
    slopes = alibi_slopes
    if slopes is not None and (slopes.shape != (H,) or not slopes.is_floating_point()):
        came = f"{tuple(slopes.shape)} {slopes.dtype}"
        raise ValueError(f"alibi_slopes: {came}, expected ({H},) floats")
    return 1 / math.sqrt(D) if scale is None else float(scale)
