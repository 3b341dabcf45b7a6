"""The processes of one launch, and the few things that they tell one another.

What this room does not do: gradients, weights (zero.py, sharding.py).
"""

import json
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.world import World


class Ranks:
    """This process among those of its launch. Alone, nothing is sent and everything comes back.

    rank: its number, from 0.    size: how many there are.    device: where tensors are sent from.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)

    def sum(self, x: Tensor) -> Tensor:
        """x becomes its sum over the ranks, in place; returns it."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether it is true of any rank."""
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)) > 0)

    def least(self, value: float) -> float:
        """The smallest of the ranks' values."""
        x = torch.tensor([value], dtype=torch.float64, device=self.device)
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

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Take leave of the others."""
        if self.size > 1:
            dist.destroy_process_group()


def connect(world: World, device: torch.device, timeout_s: float) -> Ranks:
    """The ranks of this launch, connected; alone at once.

    timeout_s: how long a rank may keep the others waiting before they give it up.
    The store is that of the launcher, under a prefix of this attempt: what a killed attempt left in
    it would lead the next one astray.
    """
    if world.size == 1:
        return Ranks(device=device)
    limit = timedelta(seconds=timeout_s)
    own = world.rank == 0 and not world.has_store
    store = dist.TCPStore(
        world.address, world.port, None, is_master=own, timeout=limit, wait_for_workers=False
    )
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"minillm/{world.attempt}", store),
        rank=world.rank,
        world_size=world.size,
        timeout=limit,
        device_id=device if device.type == "cuda" else None,
    )
    return Ranks(world.rank, world.size, device)
