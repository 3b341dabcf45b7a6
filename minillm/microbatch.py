"""How many sequences to push through the model at a time: the most that fit, found by trial."""

import time

import torch
from torch import Tensor

from minillm.errors import UnavailableError
from minillm.model import GPT
from minillm.world import available_memory, synchronize

SHARE = 0.5  # of the memory that is free now; the rest is the optimiser's and the neighbours'


def largest_that_fits(model: GPT, batch_size: int, device: torch.device) -> int:
    """The largest divisor of `batch_size` whose forward and backward pass fit in memory.

    On a GPU each candidate is run, largest first, and running out of memory is caught. On a CPU
    that would end the process, so one sequence is run and the bytes kept for its backward counted.
    Raises UnavailableError if not even one sequence fits.
    """
    divisors = [d for d in range(batch_size, 0, -1) if batch_size % d == 0]
    if device.type == "cuda":
        for candidate in divisors:
            if _runs(model, candidate, device):
                return candidate
        raise UnavailableError(_too_small(model, device))
    each = _bytes_for_backward(model, device)
    room = SHARE * available_memory(device)
    if each > room:
        raise UnavailableError(_too_small(model, device))
    return next(d for d in divisors if d * each <= room)


def seconds_per_step(model: GPT, batch_size: int, micro: int, device: torch.device) -> float:
    """A guess at one step's time, before the first: a micro-batch's, the second of two."""
    _run(model, micro, device)
    synchronize(device)
    start = time.perf_counter()
    _run(model, micro, device)
    synchronize(device)
    return (time.perf_counter() - start) * batch_size / micro


def _run(model: GPT, rows: int, device: torch.device) -> None:
    tokens = torch.zeros((rows, model.config.seq_len), dtype=torch.int64, device=device)
    model(tokens, tokens).backward()
    model.zero_grad(set_to_none=True)


def _runs(model: GPT, rows: int, device: torch.device) -> bool:
    try:
        _run(model, rows, device)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def _bytes_for_backward(model: GPT, device: torch.device) -> int:
    kept: dict[int, int] = {}
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    tokens = torch.zeros((1, model.config.seq_len), dtype=torch.int64, device=device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(tokens, tokens)
    return sum(kept.values())


def _too_small(model: GPT, device: torch.device) -> str:
    free = available_memory(device) / 2**30
    return (
        f"one sequence of {model.config.seq_len} tokens does not fit in {free:.1f} GiB of free "
        "memory; use a smaller --seq-len, --n-layer or --d-model"
    )
