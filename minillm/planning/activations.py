"""Count the bytes that a forward pass keeps for its backward pass, on tensors without data.

The method is that of training/microbatch.py, but nothing is computed or allocated, so that a model
larger than this machine can be counted too.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minillm.config.model import ModelConfig
from minillm.model.gpt import GPT
from minillm.ops import EAGER, Ops

DEEPEST = 500  # largest number of blocks that is counted, as counting takes seconds


def activation_bytes(
    config: ModelConfig,
    rows: int,
    dtype: torch.dtype,
    *,
    narrow: bool = False,
    again: bool = False,
    fused: bool = False,
) -> float | None:
    """Return bytes that sequences keep for their backward pass, or None if they are not counted.

    rows: number of sequences
    config, dtype, narrow, again, fused: see `activation_line`
    """
    line = activation_line(config, dtype, narrow=narrow, again=again, fused=fused)
    return None if line is None else line[0] + (rows - 1) * line[1]


def activation_line(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    narrow: bool = False,
    again: bool = False,
    fused: bool = False,
) -> tuple[float, float] | None:
    """Return the bytes that one sequence keeps, and those that each further one adds.

    They are counted at the deepest recurrence that has gradients. Return None if the model has a
    core and too many blocks to be counted.

    config: shape of the model
    dtype: compute dtype
    narrow: whether the parameters are in `dtype` too; else they are fp32, and their copies in
    `dtype` are kept
    again: activation checkpointing; one block, or one iteration's blocks, are kept in addition
    fused: whether attention keeps only its inputs, its output and one number per row, as on a
        GPU; else it keeps what PyTorch keeps on a CPU
    """
    r = min(config.max_recurrence, config.backprop_depth) if config.recurrent else None
    if config.recurrent and config.n_layer > DEEPEST:
        return None
    ops = replace(EAGER, attention=_fused_attention) if fused else EAGER

    def both(depth: int, again: bool) -> tuple[float, float]:
        """Return bytes for one and for two sequences; both include one copy of the weights."""
        return tuple(_at_depth(config, n, dtype, ops, depth, narrow, again) for n in (1, 2))

    one, two = both(r or config.n_layer, again)
    if again:
        whole = both(1 if r else config.n_layer, False)
        share = min(config.depths[1] + 1, config.n_layer) / config.n_layer
        one, two = one + whole[0] * share, two + whole[1] * share
    return one, two - one


def _at_depth(
    config: ModelConfig,
    rows: int,
    dtype: torch.dtype,
    ops: Ops,
    depth: int,
    narrow: bool,
    again: bool,
) -> int:
    """Return bytes kept at a depth in iterations or layers; all from the third on keep the same."""

    def kept(n: int) -> int:
        shape, r = (config, n) if config.recurrent else (replace(config, n_layer=n), None)
        return _kept(shape, rows, dtype, ops, r, narrow, again)

    return kept(depth) if depth < 3 else kept(2) + (depth - 2) * (kept(3) - kept(2))


def _kept(
    config: ModelConfig,
    rows: int,
    dtype: torch.dtype,
    ops: Ops,
    recurrence: int | None,
    narrow: bool,
    again: bool,
) -> int:
    # Some initial weights are drawn until they fit, which needs values and not only shapes.
    config = replace(config, init="gpt2", bos_id=0 if config.document_mask else None)
    # The storages are held as well, so that no key is used twice.
    kept: dict[int, tuple[int, torch.UntypedStorage]] = {}
    with FakeTensorMode():
        model = GPT(config, ops, dtype)
        model.checkpointing = again
        if narrow:
            _narrow(model, dtype)
        known = {p.untyped_storage()._cdata for p in model.parameters()}

        def note(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in known:
                kept[storage._cdata] = (storage.nbytes(), storage)
            return t

        tokens = torch.zeros((rows, config.seq_len), dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model(tokens, tokens, recurrence)
    return sum(size for size, _ in kept.values())


def _narrow(model: GPT, dtype: torch.dtype) -> None:
    """Convert the parameters to a dtype; tied ones stay one tensor."""
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                done.setdefault(id(p), nn.Parameter(p.detach().to(dtype)))
                module._parameters[name] = done[id(p)]


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """Return the shape of attention, (B, T, H, D), for q, (B, T, H, D), and k, v, (B, S, G, D)."""
    return _Fused.apply(q, k, v)


class _Fused(torch.autograd.Function):
    """Attention that keeps what a fused kernel does: inputs, output, and one number per row."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:3], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx, dy):
        raise NotImplementedError("shapes alone have no gradients")
