"""Attention in the fastest form that PyTorch has; kernels/reference/attention.py defines it.

Scores and their softmax are fp32 on every path. Probabilities may be rounded to the dtype of q
before they are multiplied by the values, as in PyTorch's own kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.kernels._entrance import differentiable, entrance, last, refuse_forward_mode
from minillm.kernels.reference import attention as reference

LONGEST = 1024  # most positions for which all probabilities are kept for the backward pass
SCORES = 1 << 19  # scores in memory at a time: as many as a CPU's caches hold
QUERIES = 128  # queries at a time; keys after the last of them are not multiplied


@entrance(narrowed=("q", "k", "v"), forward_mode=True)
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
    """Return the causal attention of q over k and v, (B, T, H, D), in q's dtype.

    It runs through scaled_dot_product_attention. Two cases do not: a soft-cap takes the reference,
    and training in bf16 on a CPU takes `_bf16_attention`, which is faster there.

    q: queries, (B, T, H, D)
    k, v: keys and values, (B, T, G, D)
    documents: number of the document of each position, (B, T)
    scale, window, softcap, alibi_slopes, dropout: see the reference
    """
    T = q.shape[1]
    if softcap:
        return reference.attention(
            q, k, v, scale=scale, window=window, documents=documents, softcap=softcap,
            alibi_slopes=alibi_slopes, dropout=dropout,
        )  # fmt: skip
    window = window if window < T else 0
    dtype = q.dtype
    if q.device.type == "cpu" and dtype == torch.bfloat16 and torch.is_grad_enabled():
        # The backward of bf16 SDPA on a CPU is five times slower than that of fp32; products in
        # bf16 that leave out most of what is masked are three times as fast again.
        plain = documents is None and alibi_slopes is None and not dropout and q.numel() > 0
        if plain and T <= LONGEST and q.shape == k.shape == v.shape:
            refuse_forward_mode("attention", (q, k, v))
            return _in_bf16(q, k, v, q.shape[3] ** -0.5 if scale is None else scale, window)[0]
        q, k, v = q.float(), k.float(), v.float()
    elif alibi_slopes is not None:
        q, k, v = _wide(q), _wide(k), _wide(v)
    mask = None
    if window or documents is not None or alibi_slopes is not None:
        positions = torch.arange(T, device=q.device)
        mask = _mask(positions, positions, window, alibi_slopes, q.dtype)  # (1 or H, T, S)
        if documents is not None:
            same = documents[:, None, :, None] == documents[:, None, None, :]  # (B, 1, T, S)
            mask = mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, -torch.inf)
    return _sdpa(q, k, v, mask, mask is None, scale, dropout).to(dtype)


@entrance(narrowed=("q", "k", "v"), forward_mode=True)
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
    """Return the causal attention of the last T positions over a cache, (B, T, H, D), in q's dtype.

    q: queries, (B, T, H, D)
    k, v: the cache, (B, S, G, D)
    lengths: entries of each row of the cache, (B,) (None: S)
    scale, window, softcap, alibi_slopes: see the reference
    """
    T, S, dtype = q.shape[1], k.shape[1], q.dtype
    if softcap or (lengths is not None and alibi_slopes is not None):
        return reference.decode_attention(
            q, k, v, lengths, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes
        )
    if lengths is None and T == 1 and alibi_slopes is None:
        # One query at the end of a full cache sees its window's keys and nothing else: no mask.
        keys = slice(max(0, S - window), S) if window else slice(None)
        return _sdpa(q, k[:, keys], v[:, keys], None, False, scale)
    if lengths is None and window:  # keys before all windows are not read
        first = max(0, S - T + 1 - window)
        k, v, S = k[:, first:], v[:, first:], S - first
    if alibi_slopes is not None:
        q, k, v = _wide(q), _wide(k), _wide(v)
    positions = torch.arange(S, device=q.device)
    if lengths is None:
        mask = _mask(positions[S - T :], positions, window, alibi_slopes, q.dtype)
    else:
        queries = lengths[:, None] - T + torch.arange(T, device=q.device)  # (B, T)
        mask = _mask(queries, positions, window, None, q.dtype)[:, None]  # (B, 1, T, S)
        # A weight of 0 times nan or infinity is nan. Overwriting all entries that are not seen
        # takes a CPU as long as attention itself, and checking the result does not. While a
        # function is compiled or transformed there is no result to check.
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if q.device.type == "cpu" and not traced:
            y = _sdpa(q, k, v, mask, False, scale)
            if bool(y.isfinite().all()):
                return y
        used = mask.any(2)[:, 0, :, None, None]  # (B, S, 1, 1)
        k, v = (torch.where(used, x, 0) for x in (k, v))
    return _sdpa(q, k, v, mask, False, scale).to(dtype)


def _wide(x: Tensor) -> Tensor:
    """Return x in at least fp32: a bias of ALiBi in bf16 would be off by up to half a score."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mask(
    queries: Tensor, keys: Tensor, window: int, alibi_slopes: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return (..., T, S), True where a key is seen; with ALiBi (H, T, S), the bias of scores."""
    distance = queries[..., None] - keys
    seen = distance >= 0
    if window:
        seen = seen & (distance < window)
    if alibi_slopes is None:
        return seen
    bias = -alibi_slopes[:, None, None] * distance
    return bias.masked_fill(~seen, -torch.inf).to(dtype)


def _sdpa(q, k, v, mask, causal, scale, dropout=0.0) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
        dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped,
    )  # fmt: skip
    return y.transpose(1, 2)  # (B, T, H, D)


def _blocks(B: int, T: int, H: int, window: int) -> list[tuple[slice, slice, slice]]:
    """Return (matrices, queries, keys) of each product; together they cover all keys seen."""
    some = max(1, SCORES // (H * min(QUERIES, T) * T)) * H  # whole rows of the batch
    found = []
    for first in range(0, B * H, some):
        for row in range(0, T, QUERIES):
            end = min(row + QUERIES, T)
            start = max(0, row - window + 1) if window else 0
            found.append(
                (slice(first, min(first + some, B * H)), slice(row, end), slice(start, end))
            )
    return found


def _size(block: tuple[slice, slice, slice]) -> tuple[int, int, int]:
    """Return the shape of a block of scores."""
    return tuple(part.stop - part.start for part in block)


def _matrices(x: Tensor) -> Tensor:
    """Return x, (B, T, H, D), as (B H, T, D), contiguous."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _heads(x: Tensor, like: Tensor) -> Tensor:
    """Return x, (B H, T, D), as (B, T, H, D), contiguous, in the dtype of `like`."""
    B, T, H, D = like.shape
    return x.view(B, H, T, D).transpose(1, 2).to(like.dtype, memory_format=torch.contiguous_format)


@torch.library.custom_op("minillm::eager_attention", mutates_args=())
def _bf16_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Return y and the probabilities of all blocks, one after the other, for the backward pass."""
    B, T, H, _ = q.shape
    y = torch.empty_like(_matrices(q))
    wide_q, wide_k, v = _matrices(q).float() * scale, _matrices(k).float(), _matrices(v)
    blocks = _blocks(B, T, H, window)
    kept = q.new_empty(sum(torch.Size(_size(block)).numel() for block in blocks))
    at = 0
    for block in blocks:
        n, rows, columns = block
        i = torch.arange(rows.start, rows.stop)[:, None]
        seen = _mask(i[:, 0], torch.arange(columns.start, columns.stop), window, None, q.dtype)
        scores = torch.bmm(wide_q[n, rows], wide_k[n, columns].mT)
        scores.masked_fill_(~seen, -torch.inf)
        p = kept[at : at + scores.numel()].view(scores.shape)
        p.copy_(scores.softmax(-1))
        y[n, rows] = torch.bmm(p, v[n, columns])
        at += scores.numel()
    return _heads(y, q), kept


@_bf16_attention.register_fake
def _(q, k, v, scale, window):
    B, T, H, _ = q.shape
    kept = sum(torch.Size(_size(block)).numel() for block in _blocks(B, T, H, window))
    return q.new_empty(q.shape), q.new_empty(kept)


@torch.library.custom_op("minillm::eager_attention_bwd", mutates_args=())
def _bf16_attention_bwd(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, dy: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, _ = q.shape
    qs, ks, vs, dys = map(_matrices, (q, k, v, dy))
    dq, dk, dv = (torch.zeros_like(qs, dtype=torch.float32) for _ in range(3))
    at = 0
    for block in _blocks(B, T, H, window):
        n, rows, columns = block
        shape = _size(block)
        p = kept[at : at + torch.Size(shape).numel()].view(shape)
        dp = torch.bmm(dys[n, rows], vs[n, columns].mT)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dv[n, columns] += torch.bmm(p.mT, dys[n, rows])
        dk[n, columns] += torch.bmm(ds.mT, qs[n, rows])
        dq[n, rows] = torch.bmm(ds, ks[n, columns])
        at += p.numel()
    return _heads(dq * scale, q), _heads(dk * scale, k), _heads(dv, v)


@_bf16_attention_bwd.register_fake
def _(q, k, v, kept, dy, scale, window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_gradients = last(_bf16_attention_bwd)


def _save(ctx, inputs, output) -> None:
    q, k, v, *ctx.numbers = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, output[1])


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 5
    return *_gradients(*ctx.saved_tensors, dy, *ctx.numbers), None, None


_in_bf16 = differentiable(_bf16_attention, _save, _backward)
