"""Attention of a few new queries over a long cache, in Triton, forward only.

What decoding waits for is the cache coming out of memory, and one row of it keeps few
multiprocessors busy. So the keys of a row are split among programs, and a second kernel combines
what they found. A program reads keys once for all queries that share them: the query heads of a
key head, times the new positions, are the rows of one matrix product.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels._attention_blocks import LOWEST, Rule, bias, load_block, readable
from minillm.kernels._entrance import entrance
from minillm.kernels._launch import DTYPES, launch, tile
from minillm.kernels._tanh import tanh

INTEGERS = (torch.int64, torch.int32, torch.int16)
WIDEST = 128  # columns of a head: what the tables of tiles end with
MOST = 128  # splits: likewise
FEW = 16  # rows: those of the smallest matrix product


@triton.jit(do_not_specialize=["T", "S", "window", "N"])
def _decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, lengths_ptr, slopes_ptr,
    factor, cap, inverse_scale, window,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_g,
    v_stride_b, v_stride_s, v_stride_g, lengths_stride, T, S, G, N,
    SHARE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, ALIBI: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T * SHARE, BLOCK_M)
    bg = tl.program_id(0) // blocks
    b = bg // G
    g = bg % G
    split = tl.program_id(1)
    length = S
    if RAGGED:
        length = tl.load(lengths_ptr + b.to(tl.int64) * lengths_stride).to(tl.int32)
    row = tl.program_id(0) % blocks * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    mask = rows < T * SHARE
    queries = length - T + rows // SHARE
    heads = g * SHARE + rows % SHARE
    where = (b.to(tl.int64) * T + rows // SHARE) * (G * SHARE) + heads
    where += split.to(tl.int64) * N  # in (splits, B, T, H)

    # The keys that some query of the block sees, in as many even shares as there are splits.
    bottom = 0
    if WINDOW:
        bottom = tl.maximum(length - T + row // SHARE - window + 1, 0)
    top = length - T + tl.minimum((row + BLOCK_M - 1) // SHARE, T - 1) + 1
    top = tl.maximum(tl.minimum(top, S), bottom)
    share = tl.cdiv(tl.cdiv(top - bottom, BLOCK_S), tl.num_programs(1)) * BLOCK_S
    start = bottom + split * share
    end = tl.minimum(start + share, top)
    if (start >= end) & (split > 0):  # the first split always writes: its y may be the last word
        tl.store(lse_ptr + where, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=mask)
        return

    columns = tl.arange(0, BLOCK_D)[None, :]
    wanted = mask[:, None]
    if D != BLOCK_D:
        wanted = wanted & (columns < D)
    q_ptr += b.to(tl.int64) * q_stride_b + g.to(tl.int64) * SHARE * q_stride_h
    at = (rows // SHARE).to(tl.int64) * q_stride_t + (rows % SHARE).to(tl.int64) * q_stride_h
    qs = tl.load(q_ptr + at[:, None] + columns, mask=wanted, other=0.0)
    if ALIBI:
        slopes = tl.load(slopes_ptr + heads, mask=mask, other=0.0) * inverse_scale
    last = tl.minimum(queries, end - 1)  # keys beyond the end repeat the one there
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    y = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for column in tl.range(start, end, BLOCK_S):
        ks = load_block(
            k_ptr, b, g, column, k_stride_b, k_stride_s, k_stride_g, end,
            BLOCK_S, D, BLOCK_D, False,
        )  # fmt: skip
        keys = column + tl.arange(0, BLOCK_S)
        s = tl.dot(qs, tl.trans(ks), input_precision="ieee")
        if CAPPED:
            s = cap * tanh(s / cap, EXACT)
        if ALIBI:
            s = bias(s, slopes[:, None], queries[:, None], keys[None, :])
        seen = keys[None, :] <= last[:, None]
        if WINDOW:
            seen = seen & (keys[None, :] > queries[:, None] - window)
        s = tl.where(seen, s * factor, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        fade = tl.exp2(peak - higher)
        p = tl.exp2(s - higher[:, None])
        mass = mass * fade + tl.sum(p, 1)
        peak = higher
        vs = load_block(
            v_ptr, b, g, column, v_stride_b, v_stride_s, v_stride_g, end,
            BLOCK_S, D, BLOCK_D, False,
        )  # fmt: skip
        y = tl.dot(p.to(vs.dtype), vs, y * fade[:, None], input_precision="ieee")
    some = mass > 0  # padding sees nothing, and nobody all keys that the block's queries see
    mass = tl.where(some, mass, 1.0)
    y = y / mass[:, None]
    lse = tl.where(some, peak + tl.log2(mass), float("-inf"))
    tl.store(lse_ptr + where, lse, mask=mask)
    tl.store(y_ptr + where[:, None] * D + columns, y.to(y_ptr.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["N", "splits"])
def _decode_attention_combine_kernel(
    parts_ptr, lse_ptr, y_ptr, N, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One query and head: the mean of all splits' results, each weighted by its mass."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    columns = tl.arange(0, BLOCK_D)
    where = split * tl.full([], N, tl.int64) + row
    lse = tl.load(lse_ptr + where, mask=split < splits, other=float("-inf"))
    peak = tl.maximum(tl.max(lse, 0), LOWEST)  # finite, if no split saw a key
    weight = tl.exp2(lse - peak)
    # What a split without weight has not written is not read.
    mask = (weight > 0)[:, None] & (columns < D)[None, :]
    parts = tl.load(parts_ptr + where[:, None] * D + columns[None, :], mask=mask, other=0.0)
    mass = tl.sum(weight, 0)
    y = tl.sum(parts * weight[:, None], 0) / tl.where(mass > 0, mass, 1.0)
    tl.store(y_ptr + row * D + columns, y.to(y_ptr.dtype.element_ty), mask=columns < D)


def _splits(programs: int, keys: int, BLOCK_S: int, device: torch.device) -> int:
    """Among how many programs to split `keys` keys where `programs` are there without.

    For two on each multiprocessor, which is enough reading on the way to keep memory busy; of at
    least one block of keys each.
    """
    gpu = device.type == "cuda"
    count = torch.cuda.get_device_properties(device).multi_processor_count if gpu else 132
    return max(1, min(2 * count // programs, triton.cdiv(keys, BLOCK_S), MOST))


@torch.library.custom_op("minillm::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, slopes: Tensor | None,
    scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    y = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    if not y.numel():
        return y
    q, k, v = map(readable, (q, k, v))
    table = "fp32" if q.dtype == torch.float32 else "many" if T * H // G > FEW else ""
    options = tile("decode_attention", "split", D, table)
    programs = triton.cdiv(T * H // G, options["BLOCK_M"]) * B * G
    keys = min(S, window + T - 1) if window else S
    splits = _splits(programs, keys, options["BLOCK_S"], q.device)
    width = max(16, triton.next_power_of_2(D))
    lse = torch.empty((splits, B, T, H), dtype=torch.float32, device=q.device)
    # One split's result is the result; of several, each leaves its own in fp32.
    shape = (splits, B, T, H, D)
    parts = y if splits == 1 else torch.empty(shape, dtype=torch.float32, device=q.device)
    launch(
        _decode_attention_kernel, (programs, splits), q, k, v, parts, lse,
        lse if lengths is None else lengths, lse if slopes is None else slopes,
        *Rule(scale, window, softcap, None, slopes).arguments(),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        0 if lengths is None else lengths.stride(0), T, S, G, B * T * H,
        SHARE=H // G, D=D, BLOCK_D=width, RAGGED=lengths is not None, WINDOW=window > 0,
        CAPPED=softcap > 0, ALIBI=slopes is not None, EXACT=q.dtype == torch.float32, **options,
    )  # fmt: skip
    if splits > 1:
        launch(
            _decode_attention_combine_kernel, (B * T * H,), parts, lse, y, B * T * H, splits,
            D=D, BLOCK_D=width, SPLITS=triton.next_power_of_2(splits),
            **tile("decode_attention", "combine", splits),
        )  # fmt: skip
    return y


@_decode_attention.register_fake
def _(q, k, v, lengths, slopes, scale, window, softcap):
    return q.new_empty(q.shape)


@entrance(narrowed=("q", "k", "v"))
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """As reference.decode_attention: causal attention of the last T positions over a cache.

        y_i = sum_j softmax_j(s_ij) v_j,   s_ij = cap(scale q_i.k_j) - slope (i - j),   j <= i

    q: (B, T, H, D).    k, v: (B, S, G, D), G divides H. One dtype of fp32, fp16 and bf16, any
    strides; without a copy if heads are contiguous, so views of a bigger cache are read in place.
    D up to 128; the products are of the next power of two, but no memory is read for the rest.
    lengths: (B,) integers, at most S: what row b holds; S if None. Entries beyond are never read.
    scale: above 0.    alibi_slopes: (H,).
    Returns (B, T, H, D) in q's dtype; zeros for a query that sees no key (padding: the first
    T - lengths[b] of a row that is shorter than T).
    No gradient: what comes out of leaves that want one raises RuntimeError in backward().
    Sums, scores and softmax are fp32, probabilities enter the second product in q's dtype. In fp16
    and bf16 a capped score errs by up to 2e-7 softcap.
    Raises ValueError if D is above 128, or on another dtype, shape or range.
    Cost: 2 B S G D numbers read, if T times H/G is up to 16; else again for each 64 of these rows
    (16 in fp32). What splits leave to be combined is in fp32, B T H D numbers each.
    Source: Dao et al. 2023, "Flash-Decoding for long-context inference"; queries of one key head
    in one product: Ringlein et al. 2025, arXiv:2511.11581.
    """
    scale = _checked(q, k, v, lengths, scale, window, softcap, alibi_slopes)
    slopes = None if alibi_slopes is None else alibi_slopes.detach().float().contiguous()
    window = window if window < k.shape[1] else 0
    return _decode_attention(q, k, v, lengths, slopes, scale, window, float(softcap))


def _checked(q, k, v, lengths, scale, window, softcap, alibi_slopes) -> float:
    """The scale; ValueError, naming the argument, unless the kernels can take these."""
    if q.dim() != 4 or not 1 <= q.shape[3] <= WIDEST:
        raise ValueError(f"q: {tuple(q.shape)}, expected (B, T, H, D) with D from 1 to {WIDEST}")
    B, _, H, D = q.shape
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise ValueError(f"{name}: {x.dtype}, expected one of {DTYPES}, the same for q, k, v")
    fits = k.dim() == 4 and (k.shape[0], k.shape[3]) == (B, D) and k.shape[2]
    if not fits or H % k.shape[2]:
        raise ValueError(f"k: {tuple(k.shape)}, expected ({B}, S, G, {D}), G a divisor of {H}")
    if v.shape != k.shape:
        raise ValueError(f"v: shape {tuple(v.shape)}, expected k's {tuple(k.shape)}")
    if lengths is not None and (lengths.shape != (B,) or lengths.dtype not in INTEGERS):
        came = f"{tuple(lengths.shape)} {lengths.dtype}"
        raise ValueError(f"lengths: {came}, expected ({B},) integers")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale: {scale}, expected a number above 0")
    if window < 0:
        raise ValueError(f"window: {window}, expected 0 or more")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: {softcap}, expected 0 or more")
    slopes = alibi_slopes
    if slopes is not None and (slopes.shape != (H,) or not slopes.is_floating_point()):
        raise ValueError(
            f"alibi_slopes: {tuple(slopes.shape)} {slopes.dtype}, expected ({H},) floats"
        )
    return 1 / math.sqrt(D) if scale is None else float(scale)
