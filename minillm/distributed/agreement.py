"""Collectives for Python values, and a way to make an error on one rank an error on all ranks.

Without the latter, the other ranks would wait for a rank that has raised an error.
"""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

from minillm import errors
from minillm.distributed.ranks import Ranks

T = TypeVar("T")
Failure = list[str]  # the name of an error's class, then its arguments
PATIENCE = timedelta(days=7)  # for work that one rank does while the others wait


def gather(ranks: Ranks, value: Any) -> list[Any]:
    """Return the values of all ranks, in the order of ranks; every rank gets the same list.

    ranks: ranks that all call this
    value: value of this rank, which must be JSON
    """
    if ranks.size == 1:
        return [value]
    text = json.dumps(value).encode("ascii")
    lengths = torch.zeros(ranks.size, dtype=torch.int64, device=ranks.device)
    lengths[ranks.rank] = len(text)
    lengths = ranks.sum(lengths).tolist()
    ends = [sum(lengths[: rank + 1]) for rank in range(ranks.size)]
    # Each rank writes into its own stretch of a buffer of zeros, so that the sum over the ranks is
    # all texts, one after the other.
    data = torch.zeros(ends[-1], dtype=torch.uint8, device=ranks.device)
    start = ends[ranks.rank] - len(text)
    data[start : ends[ranks.rank]] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(data)
    texts = ranks.sum(data).cpu().numpy().tobytes()
    return [json.loads(texts[end - n : end]) for n, end in zip(lengths, ends, strict=True)]


def agree(ranks: Ranks, work: Callable[[], T]) -> T:
    """Return what work() returns on this rank, once it has succeeded on all ranks.

    If work() raises a MinillmError on some ranks, all ranks raise that of the lowest such rank. A
    rank on which work() raises an error of another class raises that error, and the ranks without
    an error raise UnavailableError with its text.

    ranks: ranks that all call this
    work: function to run on this rank
    """
    if ranks.size == 1:
        return work()
    result, own = None, None
    try:
        result = work()
    except Exception as error:
        own = error
    failures = gather(ranks, own and _failure(own))
    if own is not None and not isinstance(own, errors.MinillmError):
        raise own
    _raise_the_same({f"rank {rank}": failure for rank, failure in enumerate(failures) if failure})
    return result


def in_turn(ranks: Ranks, name: str, work: Callable[[], T]) -> T:
    """Return what work() returns, after one rank of each machine has run it before the others.

    ranks: ranks that all call this
    name: name of the work, which must not have been used before
    work: function to run on this rank

    It may take longer than the ranks otherwise wait for one another. Raises as `agree` does.
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
        ranks.store.set(f"turn/{name}/{world.node}", json.dumps(own and _failure(own)))
    keys = [f"turn/{name}/{node}" for node in range(world.nodes)]
    ranks.store.wait(keys, PATIENCE)
    if own is not None:
        raise own
    failures = {key: json.loads(ranks.store.get(key)) for key in keys}
    _raise_the_same({key: failure for key, failure in failures.items() if failure})
    return agree(ranks, lambda: result if world.local_rank == 0 else work())


def _failure(error: Exception) -> Failure:
    """Return an error as JSON. A MinillmError keeps the marks of parameters in its text."""
    text = error.text if isinstance(error, errors.MinillmError) else str(error)
    return [type(error).__name__, text]


def _raise_the_same(failures: dict[str, Failure]) -> None:
    """Raise the first MinillmError among the failures, else UnavailableError if there is any."""
    for name, *args in failures.values():
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, errors.MinillmError):
            raise kind(*args)
    for where, (name, *args) in failures.items():
        raise errors.UnavailableError(f"{where} failed: {name}: {' '.join(args)}")
