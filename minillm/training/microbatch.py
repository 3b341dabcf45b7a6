"""Find the micro-batch: the most sequences whose forward and backward pass fit in memory."""

import time

import torch
from torch import Tensor

from minillm.distributed.strategies import Sharding
from minillm.errors import UnavailableError, parameter
from minillm.model.gpt import GPT
from minillm.runtime.device import available_memory, synchronize

SHARE = 0.5  # share of the free CPU memory to use; other processes need the rest
UNKNOWN = 4 << 30  # bytes to assume if the system does not say how many are free


def largest_that_fits(
    model: GPT, batch_size: int, device: torch.device, copies: float, sharers: int = 1
) -> int:
    """Return the largest divisor of `batch_size` whose forward and backward pass fit in memory.

    On a GPU each candidate is run, the largest first, and running out of memory is caught. On a CPU
    that would end the process. There the bytes that one and two sequences keep for their backward
    pass are counted, which gives a constant and a slope.

    model: the decoder
    batch_size: sequences of a step on this rank
    device: device of the model
    copies: fp32 tensors of each parameter's size that the optimizer and the average will need
    sharers: processes that share the memory of a CPU

    Raises UnavailableError if not even one sequence fits.
    """
    divisors = [d for d in range(batch_size, 0, -1) if batch_size % d == 0]
    later = int(4 * copies * sum(p.numel() for p in model.parameters()))
    if device.type == "cuda":
        for candidate in divisors:
            if _runs(model, candidate, device, later):
                return candidate
        raise UnavailableError(_too_small(model, torch.cuda.mem_get_info(device)[0]))
    free = available_memory(device)
    free = (UNKNOWN if free is None else free) // sharers
    one, two = (_bytes_at_most(model, rows, device) for rows in (1, 2))
    limit = SHARE * free - later
    for candidate in divisors:
        if one + (candidate - 1) * (two - one) <= limit:
            return candidate
    raise UnavailableError(_too_small(model, free))


def seconds_per_step(sharding: Sharding, rows: int, micro: int, device: torch.device) -> float:
    """Return an estimate of the seconds per step, from the second of two micro-batches.

    sharding: the model, laid out over the ranks
    device: device of the model
    rows: sequences of a step on this rank
    micro: sequences of a micro-batch
    """
    tokens = torch.zeros((micro, sharding.model.config.seq_len), dtype=torch.int64, device=device)
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        with sharding.synced(True):
            sharding.forward(tokens, tokens).backward()
        sharding.drop()
    synchronize(device)
    return (time.perf_counter() - start) * rows / micro


def _run(model: GPT, rows: int, device: torch.device, recurrence: int | None = None) -> None:
    tokens = torch.zeros((rows, model.config.seq_len), dtype=torch.int64, device=device)
    model(tokens, tokens, recurrence).backward()
    model.zero_grad(set_to_none=True)


def _deepest(model: GPT) -> int | None:
    """Return the recurrence that keeps the most for its backward pass; None without a core."""
    c = model.config
    return min(c.max_recurrence, c.backprop_depth) if c.recurrent else None


def _runs(model: GPT, rows: int, device: torch.device, later: int) -> bool:
    try:
        held = torch.empty(later, dtype=torch.uint8, device=device)
        _run(model, rows, device, _deepest(model))
        del held
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def _bytes_at_most(model: GPT, rows: int, device: torch.device) -> int:
    """Return the bytes kept for a backward pass, at most.

    With activation checkpointing these include what one part keeps that is computed again: a block,
    or an iteration of the core, which is its blocks and less than one more for the injection.
    """
    kept = _bytes_for_backward(model, rows, device, _deepest(model))
    if model.checkpointing:
        c = model.config
        model.checkpointing = False
        whole = _bytes_for_backward(model, rows, device, 1 if c.recurrent else None)
        model.checkpointing = True
        kept += whole * min(c.depths[1] + 1, c.n_layer) // c.n_layer
    return kept


def _bytes_for_backward(
    model: GPT, rows: int, device: torch.device, recurrence: int | None = None
) -> int:
    kept: dict[int, int] = {}
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    tokens = torch.zeros((rows, model.config.seq_len), dtype=torch.int64, device=device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(tokens, tokens, recurrence)
    return sum(kept.values())


def _too_small(model: GPT, free: int) -> str:
    return (
        f"one sequence of {model.config.seq_len} tokens does not fit in {free / 2**30:.1f} GiB of "
        f"free memory; use a smaller {parameter('seq_len')}, {parameter('n_layer')} or "
        f"{parameter('d_model')}"
    )
