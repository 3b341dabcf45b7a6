"""Forward pass of attention. A program takes a block of queries of a head and loops over keys.

A program does not visit blocks of keys that none of its queries sees. Where all its queries see all
keys of a block, one branch skips the mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels._attention_blocks import (
    LOWEST,
    Rule,
    bias,
    descriptor,
    first_keys,
    hide,
    load_block,
    options,
    readable,
    store_block,
    tma_reads,
)
from minillm.kernels._launch import launch
from minillm.kernels._tanh import tanh


@triton.jit(do_not_specialize=["T", "window"])
def _attention_fwd_kernel(
    q, k, v, y_ptr, lse_ptr, starts_ptr, slopes_ptr, factor, cap, inverse_scale, window,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, T, H,
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
    peak = tl.full([BLOCK_T], LOWEST, tl.float32)
    mass = tl.zeros([BLOCK_T], tl.float32)
    y = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for column in tl.range(lowest // BLOCK_S * BLOCK_S, tl.minimum(row + BLOCK_T, T), BLOCK_S):
        ks = load_block(
            k, b, h // SHARE, column, k_stride_b, k_stride_t, k_stride_h, T,
            BLOCK_S, D, BLOCK_D, TMA,
        )  # fmt: skip
        keys = column + tl.arange(0, BLOCK_S)
        s = tl.dot(qs, tl.trans(ks), input_precision="ieee")
        if CAPPED:
            s = cap * tanh(s / cap, EXACT)
        if ALIBI:
            s = bias(s, slope, queries[:, None], keys[None, :])
        if (column + BLOCK_S > row + 1) | (column < highest):
            i, j = queries[:, None], keys[None, :]
            s = hide(s, i, j, j, first[:, None], float("-inf"), DOCUMENTS or WINDOW)
        higher = tl.maximum(peak, tl.max(s, 1) * factor)
        fade = tl.exp2(peak - higher)
        p = tl.exp2(s * factor - higher[:, None])
        mass = mass * fade + tl.sum(p, 1)
        peak = higher
        vs = load_block(
            v, b, h // SHARE, column, v_stride_b, v_stride_t, v_stride_h, T,
            BLOCK_S, D, BLOCK_D, TMA,
        )  # fmt: skip
        y = tl.dot(p.to(vs.dtype), vs, y * fade[:, None], input_precision="ieee")
    y = y / mass[:, None]  # above 0: a query sees itself
    tl.store(lse_ptr + bh.to(tl.int64) * T + queries, peak + tl.log2(mass), mask=queries < T)
    store_block(y_ptr, y, b, h, row, T, H, BLOCK_T, D, BLOCK_D)


def forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Return y, (B, T, H, D), in q's dtype, and lse, (B, H, T), fp32.

    lse is log2 sum_j exp2(factor s_ij), by which the backward pass computes probabilities.

    q: (B, T, H, D)
    k, v: (B, T, G, D)
    rule: masks and biases
    """
    B, T, H, D = q.shape
    y = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if not q.numel():
        return y, lse
    q, k, v = map(readable, (q, k, v))
    block, switches = options("fwd", q, rule), rule.switches(q, k)
    rows, keys, width = block["BLOCK_T"], block["BLOCK_S"], switches["BLOCK_D"]
    tma = tma_reads(q, k, v)
    blocks = [(q, rows), (k, keys), (v, keys)]
    launch(
        _attention_fwd_kernel, (triton.cdiv(T, rows) * B * H,),
        *(descriptor(x, n, width) if tma else x for x, n in blocks), y, lse,
        lse if rule.starts is None else rule.starts, lse if rule.slopes is None else rule.slopes,
        *rule.arguments(), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], T, H,
        TMA=tma, **switches, **block,
    )  # fmt: skip
    return y, lse
