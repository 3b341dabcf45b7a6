"""Attention of a few new queries over a long cache, in Triton, forward only.

Decoding waits for the cache to be read from memory, and one row of the cache keeps few
multiprocessors busy. So the keys of a row are split among programs, and a second kernel combines
their results. A program reads keys once for all queries that share them: the query heads of a key
head, times the new positions, are the rows of one matrix product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels._attention_blocks import LOWEST, Rule, bias, load_block, readable
from minillm.kernels._attention_checks import check_heads, check_scores
from minillm.kernels._entrance import entrance
from minillm.kernels._launch import launch, tile
from minillm.kernels._tanh import tanh

INTEGERS = (torch.int64, torch.int32, torch.int16)
MOST = 128  # splits of a row: the largest in the tables of tiles
FEW = 16  # rows of the smallest matrix product


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

    # The keys that some query of the block sees, in even shares, one for each split.
    bottom = 0
    if WINDOW:
        bottom = tl.maximum(length - T + row // SHARE - window + 1, 0)
    top = length - T + tl.minimum((row + BLOCK_M - 1) // SHARE, T - 1) + 1
    top = tl.maximum(tl.minimum(top, S), bottom)
    share = tl.cdiv(tl.cdiv(top - bottom, BLOCK_S), tl.num_programs(1)) * BLOCK_S
    start = bottom + split * share
    end = tl.minimum(start + share, top)
    if (start >= end) & (split > 0):  # the first split always writes: its y may be the result
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
    some = mass > 0  # padding sees no key, and a query may see none of this split
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
    """Combine one query and head: the mean of the splits' results, each weighted by its mass."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    columns = tl.arange(0, BLOCK_D)
    where = split * tl.full([], N, tl.int64) + row
    lse = tl.load(lse_ptr + where, mask=split < splits, other=float("-inf"))
    peak = tl.maximum(tl.max(lse, 0), LOWEST)  # finite, if no split saw a key
    weight = tl.exp2(lse - peak)
    # A split without weight has written no result.
    mask = (weight > 0)[:, None] & (columns < D)[None, :]
    parts = tl.load(parts_ptr + where[:, None] * D + columns[None, :], mask=mask, other=0.0)
    mass = tl.sum(weight, 0)
    y = tl.sum(parts * weight[:, None], 0) / tl.where(mass > 0, mass, 1.0)
    tl.store(y_ptr + row * D + columns, y.to(y_ptr.dtype.element_ty), mask=columns < D)


def _splits(programs: int, keys: int, BLOCK_S: int, device: torch.device) -> int:
    """Return how many splits of `keys` keys to make, where there are `programs` without splits.

    Two programs on each multiprocessor have enough loads in flight to keep the memory busy. Each
    split has at least one block of keys.
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
    # The result of a single split is y; several leave theirs in fp32, to be combined.
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
    """Return the causal attention of the last T positions over a cache of keys and values.

        y_i = sum_j softmax_j(s_ij) v_j,   s_ij = cap(scale q_i.k_j) - slope (i - j),   j <= i
        cap(x) = softcap tanh(x / softcap), or x where softcap is 0

    Query t of row b has position lengths[b] - T + t.

    q: queries, (B, T, H, D), fp32, fp16 or bf16, D up to 128, any strides. Tensors are copied only
        if heads are not contiguous, so k and v may be views of a bigger cache
    k, v: the cache, (B, S, G, D), in q's dtype; G divides H
    lengths: entries of each row, (B,), integers up to S (None: S); later entries are never read
    scale: factor of the scores, above 0 (None: 1/sqrt(D))
    window: each query sees only keys with i - j < window (0: all)
    softcap: bound of the scores (0: none); in fp16 and bf16 a capped score is off by up to
        2e-7 softcap
    alibi_slopes: slope of each query head, (H,), any float dtype

    Returns y, (B, T, H, D), in q's dtype; zeros for a query that sees no key, as the first
    T - lengths[b] of a row that is shorter than T. Scores, softmax and sums are fp32;
    probabilities are rounded to q's dtype before they are multiplied by v.
    There is no gradient: backward() through the result raises RuntimeError.
    Raises ValueError if D is above 128, or on another dtype, shape or range.
    Cost: 2 B S G D numbers read if T H/G is up to 16, else that many for each 64 of these rows (16
    in fp32). Each split writes B T H D numbers in fp32, to be combined.
    Source: Dao et al. 2023, "Flash-Decoding for long-context inference"; queries of one key head
    in one product: Ringlein et al. 2025, arXiv:2511.11581.
    """
    check_heads(q, k, v, over_cache=True)
    scale = check_scores(q, scale, window, softcap, alibi_slopes)
    if lengths is not None and (lengths.shape != q.shape[:1] or lengths.dtype not in INTEGERS):
        came = f"{tuple(lengths.shape)} {lengths.dtype}"
        raise ValueError(f"lengths: {came}, expected ({q.shape[0]},) integers")
    slopes = None if alibi_slopes is None else alibi_slopes.detach().float().contiguous()
    window = window if window < k.shape[1] else 0
    return _decode_attention(q, k, v, lengths, slopes, scale, window, float(softcap))
