"""AdamW in Triton: one launch for all parameters, found through a table of addresses.

The host builds the table from shapes and addresses and copies it to the GPU without waiting. Each
program looks up its tensor and takes a run of blocks of it. Whole blocks are read without a mask,
16 bytes at a time. The last block of a tensor is masked.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels._launch import launch, tile

TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
COLUMNS = 8  # addresses of p, g, m, v, copy; length; first program; two fp32 rates


@triton.jit
def _pointer(row_ptr, column, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the address in a column of the table, as a pointer."""
    pointer = tl.load(row_ptr + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _adamw_block(
    p_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, start, length, rate, decay, scale,
    b1, b2, one_minus_b1, one_minus_b2, root, eps,
    COPY: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the step of BLOCK numbers from `start` on."""
    at = tl.arange(0, BLOCK)
    mask = at < length - start if MASKED else None
    p = tl.load(p_ptr + start + at, mask=mask)
    g = tl.load(g_ptr + start + at, mask=mask).to(tl.float32) * scale
    m = tl.load(m_ptr + start + at, mask=mask)
    v = tl.load(v_ptr + start + at, mask=mask)
    m = b1 * m + one_minus_b1 * g
    v = b2 * v + one_minus_b2 * (g * g)
    # Not p * (1 - lr wd): rounded, that factor is off by more than a percent of a small lr wd.
    p -= decay * p + rate * m / (tl.sqrt_rn(v) * root + eps)
    tl.store(p_ptr + start + at, p, mask=mask)
    tl.store(m_ptr + start + at, m, mask=mask)
    tl.store(v_ptr + start + at, v, mask=mask)
    if COPY is not None:
        tl.store(copy_ptr + start + at, p.to(COPY), mask=mask)


@triton.jit
def _adamw_kernel(
    table_ptr, tensor_ptr, grad_scale_ptr, b1, b2, one_minus_b1, one_minus_b2, root, eps,
    GRAD: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row_ptr = table_ptr + tl.load(tensor_ptr + program) * COLUMNS
    p_ptr = _pointer(row_ptr, 0, tl.float32, ALIGNED)
    g_ptr = _pointer(row_ptr, 1, GRAD, ALIGNED)
    m_ptr = _pointer(row_ptr, 2, tl.float32, ALIGNED)
    v_ptr = _pointer(row_ptr, 3, tl.float32, ALIGNED)
    copy_ptr = p_ptr
    if COPY is not None:
        copy_ptr = _pointer(row_ptr, 4, COPY, ALIGNED)
    length = tl.load(row_ptr + 5)
    first = tl.load(row_ptr + 6)
    rates_ptr = (row_ptr + 7).to(tl.pointer_type(tl.float32))
    rate = tl.load(rates_ptr)
    decay = tl.load(rates_ptr + 1)
    scale = 1.0
    if grad_scale_ptr is not None:
        scale = tl.load(grad_scale_ptr).to(tl.float32)
    for i in range(BLOCKS):
        start = ((program - first) * BLOCKS + i) * BLOCK
        if start + BLOCK <= length:
            _adamw_block(
                p_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, start, length, rate, decay, scale,
                b1, b2, one_minus_b1, one_minus_b2, root, eps, COPY, BLOCK, False,
            )  # fmt: skip
        elif start < length:
            _adamw_block(
                p_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, start, length, rate, decay, scale,
                b1, b2, one_minus_b1, one_minus_b2, root, eps, COPY, BLOCK, True,
            )  # fmt: skip


def _table(
    tensors: Sequence[Sequence[Tensor]], rates: np.ndarray, run: int
) -> tuple[Tensor, Tensor, int]:
    """Return the table, one row for each parameter, the row of each program, and the programs.

    tensors: p, g, m, v and, if there are copies, the copy of each of R parameters
    rates: learning rate and decay of each parameter, (R, 2), fp32
    run: number of elements that a program takes
    """
    rows = np.zeros((len(tensors), COLUMNS), np.int64)
    for row, members in zip(rows, tensors, strict=True):
        row[: len(members)] = [x.data_ptr() for x in members]
        row[5] = members[0].numel()
    programs = -(-rows[:, 5] // run)
    rows[:, 6] = programs.cumsum() - programs
    rows[:, 7:] = rates.view(np.int64)
    row_of = np.repeat(np.arange(len(rows), dtype=np.int32), programs)
    both = torch.from_numpy(np.concatenate([rows.reshape(-1).view(np.int32), row_of]))
    device = tensors[0][0].device
    if device.type == "cuda":
        both = both.pin_memory()  # the allocator keeps these pages until the copy is done
    both = both.to(device, non_blocking=True)
    return both[: 2 * rows.size].view(torch.int64), both[2 * rows.size :], len(row_of)


@torch.library.custom_op(
    "minillm::adamw", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "copies")
)
def _adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor], copies: Sequence[Tensor], grad_scale: Tensor | None, step: int,
    lr: Sequence[float], weight_decay: Sequence[float], b1: float, b2: float, eps: float,
) -> None:  # fmt: skip
    grads = [g.contiguous() for g in grads]
    lists = [params, grads, exp_avgs, exp_avg_sqs] + ([copies] if copies else [])
    rates = np.array([lr, np.multiply(lr, weight_decay)]).T  # (R, 2)
    rates[:, 0] /= 1 - b1**step
    rates = np.ascontiguousarray(rates, np.float32)
    groups: dict[tuple, list[int]] = {}
    tensors = list(zip(*lists, strict=True))
    for i, members in enumerate(tensors):
        copy = TRITON[members[4].dtype] if copies else None
        aligned = all(x.data_ptr() % 16 == 0 for x in members)
        groups.setdefault((TRITON[members[1].dtype], copy, aligned), []).append(i)
    options = tile("adamw", "step", 0)
    for (grad, copy, aligned), chosen in groups.items():
        table, row_of, programs = _table(
            [tensors[i] for i in chosen], rates[chosen], options["BLOCK"] * options["BLOCKS"]
        )
        launch(
            _adamw_kernel, (programs,), table, row_of, grad_scale, b1, b2, 1 - b1, 1 - b2,
            (1 - b2**step) ** -0.5, eps, GRAD=grad, COPY=copy, ALIGNED=aligned, COLUMNS=COLUMNS,
            **options,
        )  # fmt: skip


@_adamw.register_fake
def _(
    params, grads, exp_avgs, exp_avg_sqs, copies, grad_scale, step, lr, weight_decay, b1, b2, eps
):
    return None


def _check(
    lists: dict[str, list[Tensor] | None], rates: dict[str, list[float]], grad_scale: Tensor | None
) -> None:
    """Raise ValueError, naming the argument, unless the kernel can take these.

    lists: the lists of tensors by the names of the arguments, "params" first; None: not given
    rates: the lists of numbers by the names of the arguments
    """
    params = lists["params"]
    given = {name: members for name, members in lists.items() if members is not None}
    for name, members in {**given, **rates}.items():
        if len(members) != len(params):
            raise ValueError(f"{name}: {len(members)} of them, expected {len(params)}, as params")
    if not params:
        return
    device = params[0].device
    for name, members in given.items():
        for x, p in zip(members, params, strict=True):
            _check_tensor(name, x, p.shape, device)
    if grad_scale is not None and (grad_scale.dim() or grad_scale.device != device):
        came = f"{tuple(grad_scale.shape)} on {grad_scale.device}"
        raise ValueError(f"grad_scale: a tensor of shape {came}, expected () on {device}")


def _check_tensor(name: str, x: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raise ValueError unless the kernel can take x in the list called `name`."""
    dtypes = tuple(TRITON) if name in ("grads", "copies") else (torch.float32,)
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: a tensor is {x.dtype}, expected one of {dtypes}")
    if x.shape != shape or x.device != device:
        came, expected = f"{tuple(x.shape)} on {x.device}", f"{tuple(shape)} on {device}"
        raise ValueError(f"{name}: a tensor is {came}, expected {expected}")
    if name != "grads" and not x.is_contiguous():
        raise ValueError(f"{name}: a tensor has strides {x.stride()}, expected a contiguous one")


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    *,
    lr: list[float],
    weight_decay: list[float],
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    grad_scale: Tensor | None = None,
    copies: list[Tensor] | None = None,
) -> None:
    """Take one step of AdamW over all parameters, in place.

        g <- grad_scale g;   m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
        p <- (1 - lr wd) p - lr (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps)

    params, exp_avgs, exp_avg_sqs: p, m and v, fp32, contiguous, of equal shapes, on one device
    grads: g of each parameter, fp32, fp16 or bf16, any strides
    step: number of the step, from 1
    lr, weight_decay: learning rate and weight decay of each parameter
    betas, eps: b1 and b2, and eps of the formula
    grad_scale: factor of gradient clipping, (), on that device (None: 1)
    copies: tensors that receive the new values, fp32, fp16 or bf16, contiguous

    It computes in fp32, and the corrections 1 - b^step in fp64 on the host. It does not wait for
    the device. It must not be captured in a CUDA graph, which would repeat the step number and the
    addresses of its recording.
    There is one launch for each combination of the gradient's dtype, the copy's dtype and whether
    all addresses are multiples of 16, which is usually one launch.
    Raises ValueError on another dtype (fp64 too), shape, device, stride or length of a list.
    Cost: reads p, g, m, v and writes p, m, v and the copy once: 26 bytes for each number with bf16
    gradients, 28 with a 16-bit copy.
    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.
    """
    if step < 1:
        raise ValueError(f"step: {step}, expected 1 or more")
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    rates = {"lr": lr, "weight_decay": weight_decay}
    _check({**lists, "copies": copies}, rates, grad_scale)
    if params:
        _adamw(
            params, grads, exp_avgs, exp_avg_sqs, copies or [], grad_scale, step,
            lr, weight_decay, *betas, eps,
        )  # fmt: skip
