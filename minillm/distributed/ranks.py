"""The processes of one launch, and the few things that they tell one another.

What this room does not do: gradients, weights (zero.py, sharding.py).
"""

import json
import os
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.errors import PeerLostError, UnavailableError
from minillm.runtime import console
from minillm.runtime.launch import World, launched, shell_command
from minillm.runtime.program import complain


class Ranks:
    """This process among those of its launch. Alone, nothing is sent and everything comes back.

    world: what the launcher said.    device: where tensors are sent from.    store: of this
    attempt, where there are several ranks.
    lost_reader: whether standard error was a pipe whose other end has been closed.
    """

    def __init__(
        self,
        world: World | None = None,
        device: torch.device | str = "cpu",
        store: dist.Store | None = None,
    ) -> None:
        self.world = World() if world is None else world
        self.rank, self.size = self.world.rank, self.world.size
        self.device, self.store = torch.device(device), store
        self.lost_reader = False
        self._lanes: list[dist.ProcessGroup | None] = []

    @property
    def sums_on(self) -> torch.device:
        """Where fp64 numbers lie that are summed over the ranks; MPS, of one rank, has no fp64."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def sum(self, x: Tensor) -> Tensor:
        """x becomes its sum over the ranks, in place; returns it."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def least(self, value: float) -> float:
        """The smallest of the ranks' values."""
        x = torch.tensor([value], dtype=torch.float64, device=self.sums_on)
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MIN)
        return float(x)

    def share(self, value: Any = None) -> Any:
        """Rank 0's value, which must be JSON, on every rank."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.rank == 0 else b""
        length = self.sum(torch.tensor([len(text)], device=self.device))
        data = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(data, 0)
        return json.loads(bytes(data.cpu().tolist()))

    def share_of(self, names: Iterable[str]) -> list[str]:
        """The names that fall to this rank, where each rank takes as many."""
        return [*names][self.rank :: self.size]

    def lane(self, number: int) -> dist.ProcessGroup | None:
        """The process group of optimiser `number` of a model, made when it is first asked for.

        With two optimisers, which of them sends first may differ by rank where different parameters
        are unused; in a group of its own each keeps its order.
        """
        while len(self._lanes) <= number:
            self._lanes.append(self.new_group())
        return self._lanes[number]

    def new_group(self) -> dist.ProcessGroup | None:
        """One more process group of all ranks; with gloo it keeps three threads and five files."""
        if self.size == 1:
            return None
        # Left to itself a new group would wait half an hour for a rank that has stopped.
        return dist.new_group(timeout=dist.group.WORLD.get_group_store().timeout)

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Take leave of the others."""
        if self.size > 1:
            dist.destroy_process_group()

    def say(self, text: str) -> None:
        """One line on standard error, of rank 0 alone."""
        if self.rank == 0:
            self.lost_reader |= not complain(text, console.write)


def connect(world: World, device: torch.device, timeout_s: float) -> Ranks:
    """The ranks of this launch, connected; alone at once.

    timeout_s: how long a rank may keep the others waiting before they give it up.
    The store is that of the launcher, under a prefix of this attempt: what a killed attempt left in
    it would lead the next one astray. Raises UnavailableError if the others cannot be reached.
    """
    if world.size == 1:
        return Ranks(world, device)
    limit, cuda = timedelta(seconds=timeout_s), device.type == "cuda"
    if cuda:  # pinned memory and whatever else asks for the current device
        torch.cuda.set_device(device)
    try:
        store = dist.PrefixStore(f"attempt/{world.attempt}", open_store(world, limit))
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=limit,
            device_id=device if cuda else None,
        )
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise UnavailableError(
            f"the {world.size} ranks do not meet at {world.address}:{world.port}: {why}"
        ) from error
    return Ranks(world, device, store)


@contextmanager
def connected(world: World, device: torch.device, timeout_s: float) -> Iterator[Ranks]:
    """The ranks of `connect` inside the `with`. Raises PeerLostError when another one is gone."""
    ranks = connect(world, device, timeout_s)
    try:
        yield ranks
        ranks.close()
    except RuntimeError as error:
        # What the engine says when a peer's end of a connection closes, or stays silent.
        engine = isinstance(error, dist.DistError) or "/gloo/" in str(error)
        if world.size == 1 or not engine:
            raise
        raise PeerLostError(
            "another rank was killed, failed or has not answered for "
            f"{timeout_s:g} s (--rank-timeout); let torchrun --max-restarts N start again, or "
            f"continue with {shell_command('train', '--resume')}"
        ) from error


def open_store(world: World, limit: timedelta) -> dist.Store:
    """Where the processes of a launch leave each other word, through all attempts."""
    own = world.rank == 0 and not world.has_store
    store = dist.TCPStore(
        world.address, world.port, None, is_master=own, timeout=limit, wait_for_workers=False
    )
    return dist.PrefixStore("minillm", store)


def named(world: World) -> World:
    """With the name of the launch, drawn once and left in the launcher's store: all attempts have
    the same, and no other launch. Without torchrun there is none.
    """
    if not world.has_store:
        return world
    store = open_store(world, timedelta(seconds=60))
    name = store.compare_set("launch", "", uuid.uuid4().hex).decode()
    return replace(world, launch=name)


def first_to_say(text: str) -> bool:
    """Whether no other rank of this launch has said the same yet; it counts as said now.

    Without torchrun the store is rank 0's: where that has ended, to ask would take ten seconds, so
    once the ranks have met each speaks for itself.
    """
    world = launched()
    if world.size == 1 or dist.is_initialized() and not world.has_store:
        return True
    try:
        store = open_store(world, timedelta(seconds=5))
        return store.add(f"said/{world.attempt}/{text}", 1) == 1
    except RuntimeError:
        return True


def leave(code: int) -> int:
    """`code`, to exit with; one of several ranks ends in here, at once, without Python's own end.

    A thread of gloo may be about to let go of a tensor. If Python is shutting down by then it ends
    that thread in a way that aborts the process (before CPython 3.14): code 134 after a good run.
    """
    if launched().size > 1:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code
