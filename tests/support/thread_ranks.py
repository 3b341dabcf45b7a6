"""Ranks that are threads of one process: quick, and they can be made to fail at will."""

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from minillm.distributed.ranks import Ranks
from minillm.runtime.launch import World


class ThreadRanks(Ranks):
    """One of `size` threads, which sum by way of a list that all of them see."""

    def __init__(self, rank: int, size: int, slots: list, barrier: threading.Barrier) -> None:
        super().__init__(World(rank=rank, size=size))
        self.slots, self.barrier = slots, barrier

    def sum(self, x: Tensor) -> Tensor:
        self.slots[self.rank] = x.clone()
        self.barrier.wait()
        total = sum(self.slots[1:], self.slots[0].clone())
        self.barrier.wait()
        return x.copy_(total)


def together(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """work(ranks) of each rank: what it returned, or the exception that it raised.

    A rank that does not come to where the others wait breaks their wait after 30 s.
    """
    slots, barrier, results = [None] * size, threading.Barrier(size, timeout=30), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, size, slots, barrier))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def well(results: list[Any]) -> list[Any]:
    """The results, if none of them is an exception."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
