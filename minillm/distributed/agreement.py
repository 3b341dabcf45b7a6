"""What one rank has, told to all; and work that fails on every rank if it fails on one.

Without it a rank that met an error would leave the others waiting for it.
"""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

from minillm import errors
from minillm.distributed.ranks import Ranks

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # for work that one rank does while the others wait


def gather(ranks: Ranks, value: Any) -> list[Any]:
    """Every rank's value, which must be JSON, by rank; the same on all of them."""
    if ranks.size == 1:
        return [value]
    text = json.dumps(value).encode("ascii")
    lengths = torch.zeros(ranks.size, dtype=torch.int64, device=ranks.device)
    lengths[ranks.rank] = len(text)
    lengths = ranks.sum(lengths).tolist()
    ends = [sum(lengths[: rank + 1]) for rank in range(ranks.size)]
    # Each fills in its own stretch of zeros: the sum is all of them, one after the other.
    data = torch.zeros(ends[-1], dtype=torch.uint8, device=ranks.device)
    start = ends[ranks.rank] - len(text)
    data[start : ends[ranks.rank]] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(data)
    told = ranks.sum(data).cpu().numpy().tobytes()
    return [json.loads(told[end - n : end]) for n, end in zip(lengths, ends, strict=True)]


def agree(ranks: Ranks, work: Callable[[], T]) -> T:
    """What work() returns on this rank, when it has been done on all; all raise if one does.

    A refusal is raised alike by all, that of the lowest rank that has one. Any other error is
    raised by its own rank; those without any raise UnavailableError, which tells of it.
    """
    if ranks.size == 1:
        return work()
    result, own = None, None
    try:
        result = work()
    except Exception as error:
        own = error
    told = gather(ranks, own and [type(own).__name__, str(own)])
    if own is not None and not isinstance(own, errors.MinillmError):
        raise own
    _raise_alike({f"rank {rank}": failure for rank, failure in enumerate(told) if failure})
    return result


def in_turn(ranks: Ranks, name: str, work: Callable[[], T]) -> T:
    """What work() returns, done by one rank of each machine first and then by the others.

    name: of the work, used once. However long it takes: nobody is given up meanwhile. Raises as
    `agree` does.
    """
    world = ranks.world
    if ranks.size == 1:
        return work()
    result, own = None, None
    if world.local_rank == 0:
        try:
            result = work()
        except Exception as error:
            own = error
        failure = own and [type(own).__name__, str(own)]
        ranks.store.set(f"turn/{name}/{world.node}", json.dumps(failure))
    keys = [f"turn/{name}/{node}" for node in range(world.nodes)]
    ranks.store.wait(keys, PATIENCE)
    if own is not None:
        raise own
    told = {key: json.loads(ranks.store.get(key)) for key in keys}
    _raise_alike({key: failure for key, failure in told.items() if failure})
    return agree(ranks, lambda: result if world.local_rank == 0 else work())


def _raise_alike(failures: dict[str, list[str]]) -> None:
    """Raise what others have failed with: a refusal as it is, else that there was a failure."""
    for name, text in failures.values():
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, errors.MinillmError):
            raise kind(text)
    for who, (name, text) in failures.items():
        raise errors.UnavailableError(f"{who} failed: {name}: {text}")
