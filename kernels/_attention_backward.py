"""Backward pass of attention in three launches. Without atomics, results repeat bit for bit.

    delta_i = sum(y_i dy_i)                    a constant of each row in the softmax's derivative
    dv_j = sum_i p_ij dy_i                     one program for each block of keys and key head
    dk_j = scale sum_i ds_ij q_i,   ds_ij = p_ij (dy_i.v_j - delta_i) (1 - tanh^2 if capped)
    dq_i = scale sum_j ds_ij k_j               one program for each block of queries and query head

Probabilities are computed a second time, from lse.
Source: Dao 2023, arXiv:2307.08691, algorithm 2.

The kernel of dk and dv has one loop over the query heads of a group and the blocks of queries, so
that its pipeline is filled only once. With a branch around the mask, as in the forward pass, ptxas
would wait for every single wgmma, because two accumulators are in flight. So blocks with a mask and
blocks without one have a loop each (SPLIT), or all blocks are masked, which takes fewer registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minillm.kernels._attention_blocks import (
    Rule,
    bias,
    descriptor,
    first_keys,
    hide,
    load_block,
    options,
    padded,
    readable,
    store_block,
    tma_reads,
)
from minillm.kernels._launch import launch
from minillm.kernels._tanh import tanh


@triton.jit(do_not_specialize=["T"])
def _attention_delta_bwd_kernel(
    y_ptr, dy_ptr, lse_ptr, lse_padded_ptr, delta_ptr, dy_stride_b, dy_stride_t, dy_stride_h,
    T, TP, H, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write delta, and a copy of lse, both padded to TP; +inf there makes p = exp2(s - lse) 0."""
    blocks = TP // BLOCK_T
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_T
    b = bh // H
    h = bh % H
    queries = row + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_D)[None, :]
    rows = tl.arange(0, BLOCK_T)[:, None]
    mask = (row + rows < T) & (columns < D)
    y_ptr += ((b * T + row) * H + h) * D
    dy_ptr += b * dy_stride_b + row.to(tl.int64) * dy_stride_t + h * dy_stride_h
    y = tl.load(y_ptr + rows * (H * D) + columns, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + rows * dy_stride_t + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + bh * TP + queries, tl.sum(y * dy, 1))
    lse = tl.load(lse_ptr + bh * T + queries, mask=queries < T, other=float("inf"))
    tl.store(lse_padded_ptr + bh * TP + queries, lse)


@triton.jit
def _load_row(x, start, ROWS: tl.constexpr, TMA: tl.constexpr):
    """Return ROWS numbers of lse or delta.

    By a plain load, without TMA, each thread fetches the numbers of its rows one by one. That costs
    registers and a third of the instructions of the loop.
    """
    if TMA:
        numbers = x.load([start])
    else:
        numbers = tl.load(x + tl.arange(0, ROWS) + start)
    return numbers


@triton.jit
def _add_dk_dv(
    q, dy, lse, delta, ks, vs, dk, dv, keys, last, slopes_ptr, factor, cap, inverse_scale,
    b, h, row, q_stride_b, q_stride_t, q_stride_h, dy_stride_b, dy_stride_t, dy_stride_h, T, TP, H,
    BLOCK_T: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, ALIBI: tl.constexpr, EXACT: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Return dk and dv with the terms of the queries row to row + BLOCK_T of head h added."""
    qs = load_block(q, b, h, row, q_stride_b, q_stride_t, q_stride_h, T, BLOCK_T, D, BLOCK_D, TMA)
    dys = load_block(
        dy, b, h, row, dy_stride_b, dy_stride_t, dy_stride_h, T, BLOCK_T, D, BLOCK_D, TMA
    )
    queries = row + tl.arange(0, BLOCK_T)
    lses = _load_row(lse, (b * H + h) * TP + row, BLOCK_T, TMA)
    deltas = _load_row(delta, (b * H + h) * TP + row, BLOCK_T, TMA)
    s = tl.dot(ks, tl.trans(qs), input_precision="ieee")  # (BLOCK_S, BLOCK_T)
    if CAPPED:
        t = tanh(s / cap, EXACT)
        s = cap * t
    if ALIBI:
        slope = tl.load(slopes_ptr + h) * inverse_scale
        s = bias(s, slope, queries[None, :], keys[:, None])
    p = tl.exp2(s * factor - lses[None, :])
    if MASKED:
        i, j = queries[None, :], keys[:, None]
        p = hide(p, i, j, last[:, None], i, 0.0, BOUNDED)
    weights = p.to(dys.dtype)
    if CAPPED:  # before the product, so that t needs no registers after it
        p *= 1 - t * t
    dv = tl.dot(weights, dys, dv, input_precision="ieee")
    ds = p * (tl.dot(vs, tl.trans(dys), input_precision="ieee") - deltas[None, :])
    dk = tl.dot(ds.to(qs.dtype), qs, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["T", "window"])
def _attention_dkdv_bwd_kernel(
    q, k, v, dy, lse, delta, dk_ptr, dv_ptr, ends_ptr, slopes_ptr,
    factor, cap, inverse_scale, window, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, dy_stride_b, dy_stride_t, dy_stride_h, T, TP, H, G,
    SHARE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, ALIBI: tl.constexpr,
    EXACT: tl.constexpr, TMA: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_S)
    bg = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK_S
    b = bg // G
    g = bg % G
    keys = column + tl.arange(0, BLOCK_S)
    # One past the last query that sees any key of this block, every key, and each key.
    end = T
    full = TP
    ends = tl.zeros([BLOCK_S], tl.int32) + TP
    if DOCUMENTS:
        ends_ptr += b.to(tl.int64) * T
        end = tl.load(ends_ptr + tl.minimum(column + BLOCK_S, T) - 1)
        full = tl.load(ends_ptr + column)
        ends = tl.load(ends_ptr + tl.minimum(keys, T - 1))
    if WINDOW:
        end = tl.minimum(end, column + BLOCK_S - 1 + window)
        full = tl.minimum(full, column + window)
        ends = tl.minimum(ends, keys + window)
    # Blocks of queries from the one that holds row `column` on: the first `left` ones touch the
    # diagonal, the next `middle` ones see every key, and the rest crosses an end.
    first = column // BLOCK_T * BLOCK_T
    total = tl.cdiv(end - first, BLOCK_T)
    left = tl.minimum(tl.cdiv(column + BLOCK_S, BLOCK_T) - column // BLOCK_T, total)
    middle = tl.maximum(tl.minimum((full - first) // BLOCK_T, total) - left, 0)
    if not SPLIT:
        middle = 0
    edges = total - middle
    ks = load_block(
        k, b, g, column, k_stride_b, k_stride_t, k_stride_h, T, BLOCK_S, D, BLOCK_D, TMA
    )
    vs = load_block(
        v, b, g, column, v_stride_b, v_stride_t, v_stride_h, T, BLOCK_S, D, BLOCK_D, TMA
    )
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for n in tl.range(0, SHARE * edges):
        h = n // edges
        block = n - h * edges
        row = first + tl.where(block < left, block, block + middle) * BLOCK_T
        dk, dv = _add_dk_dv(
            q, dy, lse, delta, ks, vs, dk, dv, keys, ends - 1, slopes_ptr,
            factor, cap, inverse_scale, b, g * SHARE + h, row,
            q_stride_b, q_stride_t, q_stride_h, dy_stride_b, dy_stride_t, dy_stride_h, T, TP, H,
            BLOCK_T, D, BLOCK_D, DOCUMENTS or WINDOW, True, CAPPED, ALIBI, EXACT, TMA,
        )  # fmt: skip
    if SPLIT:
        for n in tl.range(0, SHARE * middle):
            h = n // middle
            row = first + (left + n - h * middle) * BLOCK_T
            dk, dv = _add_dk_dv(
                q, dy, lse, delta, ks, vs, dk, dv, keys, ends - 1, slopes_ptr,
                factor, cap, inverse_scale, b, g * SHARE + h, row,
                q_stride_b, q_stride_t, q_stride_h, dy_stride_b, dy_stride_t, dy_stride_h, T, TP, H,
                BLOCK_T, D, BLOCK_D, DOCUMENTS or WINDOW, False, CAPPED, ALIBI, EXACT, TMA,
            )  # fmt: skip
    store_block(dk_ptr, dk * scale, b, g, column, T, G, BLOCK_S, D, BLOCK_D)
    store_block(dv_ptr, dv, b, g, column, T, G, BLOCK_S, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "window"])
def _attention_dq_bwd_kernel(
    q, k, v, dy, lse_ptr, delta_ptr, dq_ptr, starts_ptr, slopes_ptr,
    factor, cap, inverse_scale, window, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, dy_stride_b, dy_stride_t, dy_stride_h, T, TP, H,
    SHARE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, ALIBI: tl.constexpr,
    EXACT: tl.constexpr, TMA: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_T)
    bh = tl.program_id(0) // blocks
    row = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_T  # longest loops first
    b = bh // H
    h = bh % H
    queries = row + tl.arange(0, BLOCK_T)
    first, lowest, highest = first_keys(
        starts_ptr, b, row, T, window, BLOCK_T, DOCUMENTS, WINDOW
    )  # fmt: skip
    if ALIBI:
        slope = tl.load(slopes_ptr + h) * inverse_scale
    qs = load_block(q, b, h, row, q_stride_b, q_stride_t, q_stride_h, T, BLOCK_T, D, BLOCK_D, TMA)
    dys = load_block(
        dy, b, h, row, dy_stride_b, dy_stride_t, dy_stride_h, T, BLOCK_T, D, BLOCK_D, TMA
    )
    lse = tl.load(lse_ptr + bh.to(tl.int64) * TP + queries)
    delta = tl.load(delta_ptr + bh.to(tl.int64) * TP + queries)
    dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for column in tl.range(lowest // BLOCK_S * BLOCK_S, tl.minimum(row + BLOCK_T, T), BLOCK_S):
        ks = load_block(
            k, b, h // SHARE, column, k_stride_b, k_stride_t, k_stride_h, T,
            BLOCK_S, D, BLOCK_D, TMA,
        )  # fmt: skip
        vs = load_block(
            v, b, h // SHARE, column, v_stride_b, v_stride_t, v_stride_h, T,
            BLOCK_S, D, BLOCK_D, TMA,
        )  # fmt: skip
        keys = column + tl.arange(0, BLOCK_S)
        s = tl.dot(qs, tl.trans(ks), input_precision="ieee")
        if CAPPED:
            t = tanh(s / cap, EXACT)
            s = cap * t
        if ALIBI:
            s = bias(s, slope, queries[:, None], keys[None, :])
        p = tl.exp2(s * factor - lse[:, None])
        if (column + BLOCK_S > row + 1) | (column < highest):
            i, j = queries[:, None], keys[None, :]
            p = hide(p, i, j, j, first[:, None], 0.0, DOCUMENTS or WINDOW)
        if CAPPED:
            p *= 1 - t * t
        ds = p * (tl.dot(dys, tl.trans(vs), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(ks.dtype), ks, dq, input_precision="ieee")
    store_block(dq_ptr, dq * scale, b, h, row, T, H, BLOCK_T, D, BLOCK_D)


def _padded_statistics(
    y: Tensor, lse: Tensor, dy: Tensor, width: int, block: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """Return lse and delta, (B, H, TP), fp32: one number for each row, padded to whole blocks."""
    B, T, H, D = y.shape
    TP, shape = padded(T), (B, H, padded(T))
    lse_padded, delta = (torch.empty(shape, dtype=torch.float32, device=y.device) for _ in range(2))
    launch(
        _attention_delta_bwd_kernel, (TP // block["BLOCK_T"] * B * H,),
        y, dy, lse, lse_padded, delta, *dy.stride()[:3], T, TP, H, D=D, BLOCK_D=width, **block,
    )  # fmt: skip
    return lse_padded, delta


def backward(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, dy: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, in the shapes and dtypes of q, k and v.

    q, k, v, y, lse, rule: arguments and results of `forward`
    dy: gradient of y, (B, T, H, D)
    """
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not q.numel():
        return dq, dk, dv
    q, k, v, dy = map(readable, (q, k, v, dy))
    B, T, H, _ = q.shape
    TP = padded(T)
    switches = rule.switches(q, k)
    width = switches["BLOCK_D"]
    lse_padded, delta = _padded_statistics(y, lse, dy, width, options("delta", q, rule))
    tma = tma_reads(q, k, v, dy)
    strides = [n for x in (q, k, v, dy) for n in x.stride()[:3]]
    slopes = lse if rule.slopes is None else rule.slopes
    starts, ends = rule.starts, None
    if starts is not None:
        ends = torch.searchsorted(starts, starts, right=True, out_int32=True)

    def blocks(rows: int, keys: int) -> list:
        read = [(q, rows), (k, keys), (v, keys), (dy, rows)]
        return [descriptor(x, n, width) if tma else x for x, n in read]

    block = options("dkdv", q, rule)
    statistics = [lse_padded, delta]
    if tma:
        rows = block["BLOCK_T"]
        statistics = [TensorDescriptor(x, [x.numel()], [1], [rows]) for x in statistics]
    launch(
        _attention_dkdv_bwd_kernel, (triton.cdiv(T, block["BLOCK_S"]) * B * k.shape[2],),
        *blocks(block["BLOCK_T"], block["BLOCK_S"]), *statistics, dk, dv,
        lse if ends is None else ends, slopes, *rule.arguments(), rule.scale,
        *strides, T, TP, H, k.shape[2], TMA=tma, **switches, **block,
    )  # fmt: skip
    block = options("dq", q, rule)
    launch(
        _attention_dq_bwd_kernel, (triton.cdiv(T, block["BLOCK_T"]) * B * H,),
        *blocks(block["BLOCK_T"], block["BLOCK_S"]), lse_padded, delta, dq,
        lse if starts is None else starts, slopes, *rule.arguments(), rule.scale,
        *strides, T, TP, H, TMA=tma, **switches, **block,
    )  # fmt: skip
    return dq, dk, dv
