"""Connect the processes of one launch, and exchange small values between them."""

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

from minillm.errors import PeerLostError, UnavailableError, parameter
from minillm.runtime import console
from minillm.runtime.launch import World, launched, shell_command
from minillm.runtime.program import complain


class Ranks:
    """The ranks of a launch, as this process sees them. A process alone sends nothing.

    world: the launch, as the launcher has set it; None: this process is alone
    device: the device of the tensors that are sent
    store: the key-value store of this attempt; None if there is one rank

    `lost_reader` is True once a line could not be written to standard error because it is a pipe
    whose other end has been closed.
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
        self._groups: list[dist.ProcessGroup | None] = []

    @property
    def sums_on(self) -> torch.device:
        """The device on which fp64 numbers are summed over the ranks; MPS has no fp64."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def sum(self, x: Tensor) -> Tensor:
        """Replace x by its sum over the ranks, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def minimum(self, value: float) -> float:
        """Return the smallest of the ranks' values."""
        x = torch.tensor([value], dtype=torch.float64, device=self.sums_on)
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MIN)
        return float(x)

    def broadcast(self, value: Any = None) -> Any:
        """Return rank 0's value on every rank.

        value: value to send, which must be JSON; it is ignored on the other ranks
        """
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.rank == 0 else b""
        length = self.sum(torch.tensor([len(text)], device=self.device))
        data = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(data, 0)
        return json.loads(bytes(data.cpu().tolist()))

    def own_share(self, names: Iterable[str]) -> list[str]:
        """Return this rank's share of the names; shares differ in length by at most one name."""
        return [*names][self.rank :: self.size]

    def optimizer_group(self, number: int) -> dist.ProcessGroup | None:
        """Return the process group of optimiser `number` of a model; it is made at the first call.

        If different parameters are unused on different ranks, the ranks may differ in which of two
        optimisers sends first. Therefore each optimiser sends in a separate group, in which its
        collectives keep their order.
        """
        while len(self._groups) <= number:
            self._groups.append(self.new_group())
        return self._groups[number]

    def new_group(self) -> dist.ProcessGroup | None:
        """Return a new process group of all ranks; None if there is one rank.

        With gloo it keeps three threads and five open files.
        """
        if self.size == 1:
            return None
        # By default a new group would wait half an hour for a rank that has stopped.
        return dist.new_group(timeout=dist.group.WORLD.get_group_store().timeout)

    def wait(self) -> None:
        """Wait until all ranks have called this."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Close the connections to the other ranks."""
        if self.size > 1:
            dist.destroy_process_group()

    def say(self, text: str) -> None:
        """Write one line to standard error, on rank 0 alone."""
        if self.rank == 0:
            self.lost_reader |= not complain(text, console.write)


ALONE = Ranks()


def connect(world: World, device: torch.device, timeout_s: float) -> Ranks:
    """Return the ranks of this launch, connected. A process alone returns at once.

    world: the launch, as the launcher has set it
    device: device of the tensors that are sent; "cuda" uses NCCL, any other gloo
    timeout_s: seconds that the others wait for a rank before they take it for lost

    The ranks meet at the launcher's store. Each attempt uses a separate prefix in it, because a
    killed attempt leaves its keys there. Raises UnavailableError if the other ranks cannot be
    reached.
    """
    if world.size == 1:
        return Ranks(world, device)
    limit, cuda = timedelta(seconds=timeout_s), device.type == "cuda"
    if cuda:  # pinned memory belongs to the current device
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
    """Connect the ranks of this launch inside the `with`.

    world, device, timeout_s: see connect

    Raises UnavailableError as connect does, and PeerLostError if another rank is gone or does not
    answer.
    """
    ranks = connect(world, device, timeout_s)
    try:
        yield ranks
        ranks.close()
    except RuntimeError as error:
        # NCCL and gloo raise this when another rank's connection closes or does not answer.
        backend = isinstance(error, dist.DistError) or "/gloo/" in str(error)
        if world.size == 1 or not backend:
            raise
        raise PeerLostError(
            "another rank was killed, failed or has not answered for "
            f"{timeout_s:g} s ({parameter('rank_timeout')}); let torchrun --max-restarts N start "
            f"again, or continue with {shell_command('train', '--resume')}"
        ) from error


def open_store(world: World, limit: timedelta) -> dist.Store:
    """Open the key-value store of a launch, which all of its attempts share.

    world: the launch, as the launcher has set it
    limit: how long an operation of the store waits
    """
    own = world.rank == 0 and not world.has_store
    store = dist.TCPStore(
        world.address, world.port, None, is_master=own, timeout=limit, wait_for_workers=False
    )
    return dist.PrefixStore("minillm", store)


def with_launch_name(world: World) -> World:
    """Return the world with the name of its launch; without torchrun a launch has no name.

    The name is random and kept in the launcher's store, so that all attempts have the same one.
    """
    if not world.has_store:
        return world
    store = open_store(world, timedelta(seconds=60))
    name = store.compare_set("launch", "", uuid.uuid4().hex).decode()
    return replace(world, launch=name)


def first_to_say(text: str) -> bool:
    """Return whether no other rank of this launch has printed this text, and record that one has.

    Without torchrun rank 0 holds the store, and a request to a rank 0 that has ended would take ten
    seconds. Therefore the result is True on every rank once such ranks are connected.
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
    """Return the exit code `code`, or exit here with it if the process is one of several ranks.

    The exit skips Python's shutdown, because a thread of gloo may still have to free a tensor.
    During a shutdown, Python before 3.14 ends that thread in a way that aborts the process, with
    code 134 after a good run.
    """
    if launched().size > 1:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code
