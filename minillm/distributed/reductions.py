"""Run the reduce-scatters of ZeroOptimizer, at most IN_FLIGHT at a time."""

from collections import deque
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.distributed.buckets import Bucket
from minillm.distributed.offload import HostCopies
from minillm.distributed.pieces import nbytes
from minillm.distributed.ranks import Ranks

_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # torch 2.13
IN_FLIGHT = 2  # one is sent, and one waits so that the next can be sent at once


class Reduction(NamedTuple):
    """A reduce-scatter that has been started: `full` of a bucket is summed into `out`.

    work: the handle to wait for; None on one rank
    out: (chunk,) this rank's chunk of the sum
    last: whether it belongs to the last micro-batch of a step
    """

    bucket: Bucket
    work: Any
    out: Tensor
    full: Tensor
    last: bool


class Reductions:
    """A queue of reduce-scatters; each, when complete, is added to the shard of its bucket.

    stage: 1 keeps `full` of a bucket and sets it to 0; 2 frees it
    group: the process group to send in
    host: copies shards to host memory at the end of a step; None: they stay on the device
    """

    def __init__(
        self, ranks: Ranks, stage: int, group: dist.ProcessGroup | None, host: HostCopies | None
    ) -> None:
        self._ranks, self._stage, self._group, self._host = ranks, stage, group, host
        self._queue: deque[Reduction] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    @torch.no_grad()
    def start(self, bucket: Bucket, last: bool) -> None:
        """Start the reduce-scatter of a bucket's gradients.

        bucket: bucket whose `full` is summed; zeros if it has none
        last: whether this is the last micro-batch of the step
        """
        while len(self._queue) >= IN_FLIGHT or any(r.bucket is bucket for r in self._queue):
            self._complete_oldest()
        full = bucket.empty_gradients() if bucket.full is None else bucket.full
        out = torch.empty(bucket.chunk, dtype=bucket.wire, device=full.device)
        work = None
        if self._ranks.size == 1:
            out.copy_(full)
        else:
            work = _reduce_scatter(out, full, group=self._group, async_op=True)
        if self._stage == 2:
            bucket.full = None
        self._queue.append(Reduction(bucket, work, out, full, last))

    @torch.no_grad()
    def complete(self) -> None:
        """Wait until all gradients are in the shards."""
        while self._queue:
            self._complete_oldest()
        if self._host:
            self._host.wait()

    def nbytes(self) -> tuple[int, int]:
        """Return the bytes of the results and the bytes of the gradients that are summed."""
        return nbytes(r.out for r in self._queue), nbytes(r.full for r in self._queue)

    def _complete_oldest(self) -> None:
        """Wait for the oldest reduce-scatter, and add its result to the shard."""
        bucket, work, out, full, last = self._queue.popleft()
        if work is not None:
            work.wait()  # gloo writes `out` in here
        if self._stage == 1:
            full.zero_()
        if bucket.shard is None:
            bucket.shard = out.to(bucket.master.dtype)
        else:
            bucket.shard.add_(out.to(bucket.shard.device))
        if last and self._host:
            bucket.shard = self._host.down(bucket.shard)
