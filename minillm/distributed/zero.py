"""ZeRO, stages 1 and 2: one optimiser, its state spread over the ranks.

    every backward      hooks move each gradient into its bucket
    as buckets fill     reduce-scatter: the sum over ranks of this rank's chunk  (stage 1: in the
                        last micro-batch of a step; 2: in every one, the buffer freed behind it)
    step                the optimiser moves this rank's chunk; all-gather: everybody's come back

Bytes a rank for P parameters on W ranks, AdamW, stored in (fp32 | bf16):
    parameters 4P | 2P,  gradients stage 1: 4P + 4P/W, 2: 4P/W and about three buckets,
    masters 0 | 4P/W,  moments 8P/W; to which comes the padding of the buckets.
Losses must be weighted so that the sum over ranks is the gradient wanted. All ranks call the same
methods in the same order and begin with equal parameters; at any one number of ranks results
repeat bit for bit.

Source: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from minillm.distributed.buckets import Bucket, Flight, make_buckets
from minillm.distributed.offload import Lane
from minillm.distributed.pieces import Piece, Read, drop, fill, give, inner_group, nbytes, pieces_of
from minillm.distributed.ranks import Ranks
from minillm.distributed.trained import Arrivals, Frozen
from minillm.optim.clip import sum_of_squares

# torch 2.13 has renamed both.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
IN_FLIGHT = 2  # reductions at a time: one on the wire, one behind it so that the wire never waits


class ZeroOptimizer:
    """Any element-wise torch optimiser, or Muon by whole matrices, sharded over ranks.

    parameters: by name, in the model's order; those it moves become views of flat buffers. What is
    frozen (requires_grad=False) stays as it is, whole on every rank, and has no state.
    groups: as an optimiser's, but "params" are names. Lists as long as them ("parts") go with the
    parameters, anything else is handed on.    make: builds the inner optimiser from such groups
    over this rank's elements: 1-D, or whole matrices.    stage: 1 or 2.
    dtype: what parameters are stored in, None: as they are. Below fp32, masters are kept in fp32.
    whole: no parameter is cut, as Muon needs it.    bucket_mb: 2**20 bytes that go in one
    collective.    reduce_dtype: gradients are summed in it, or in the parameters' if that is wider.
    offload: masters and the optimiser's state lie in host memory; `make` builds for the CPU.
    group: of all ranks, to send in, no other optimiser's of the same step; None: a new one.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        groups: list[dict[str, Any]],
        make: Callable[[list[dict]], Optimizer],
        ranks: Ranks,
        *,
        stage: int = 1,
        dtype: torch.dtype | None = None,
        whole: bool = False,
        bucket_mb: float = 25,
        reduce_dtype: torch.dtype = torch.float32,
        offload: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if stage not in (1, 2):
            raise ValueError(f"stage is {stage}; expected 1 or 2")
        named = [name for group in groups for name in group["params"]]
        if sorted(named) != sorted(parameters) or len(set(parameters.values())) < len(named):
            raise ValueError("groups must name every parameter once, and no other")
        self.frozen = Frozen(parameters)
        groups = [self.frozen.left_out(group) for group in groups]
        self.ranks, self.stage = ranks, stage
        self._arrivals = Arrivals(n for n in parameters if n not in self.frozen)
        self._comm = ranks.new_group() if group is None else group
        self._lane = Lane(ranks.device) if offload else None
        self._flying: deque[Flight] = deque()
        self._open = self._last = False
        self._complete = True  # no micro-batch of an unfinished step has come
        self._next = 0  # the bucket whose turn it is to be reduced

        by_group = [
            make_buckets(
                parameters, group["params"], ranks.rank, ranks.size, dtype=dtype, whole=whole,
                reduce_dtype=reduce_dtype, bucket_mb=bucket_mb, offload=offload,
            )
            for group in groups
        ]  # fmt: skip
        self.inner = make([inner_group(*pair) for pair in zip(groups, by_group, strict=True)])
        # Complete when the gradient of their earliest parameter is there: later ones go first.
        place = {name: i for i, name in enumerate(parameters)}
        self.buckets = sorted(
            (bucket for buckets in by_group for bucket in buckets),
            key=lambda bucket: -min(place[name] for name in bucket.parameters),
        )
        for bucket in self.buckets:
            if stage == 1:
                bucket.full = bucket.empty_gradients()
            for name, p in bucket.parameters.items():
                p.register_post_accumulate_grad_hook(partial(self._take, bucket, name))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimiser's groups, one for each given; their "lr" may be set."""
        return self.inner.param_groups

    @contextmanager
    def synced(self, last: bool) -> Iterator[None]:
        """Around the backward of a micro-batch; last: of a step. All ranks do as many.

        A gradient that is missing on some ranks counts as zero there. Raises RuntimeError where a
        parameter gets two, or gets one outside of it; call zero_grad() where a backward was broken
        off.
        """
        self._open, self._complete, self._last, self._next = True, False, last, 0
        for bucket in self.buckets:
            bucket.missing = set(bucket.parameters)
        try:
            yield
        finally:
            self._open = False
        self._reduce_in_turn(lambda bucket: True)
        if last:
            send = partial(dist.all_reduce, op=dist.ReduceOp.MAX, group=self._comm, async_op=True)
            self._arrivals.tell(self.ranks.device, send if self.ranks.size > 1 else None)
        self._complete = last

    @torch.no_grad()
    def _take(self, bucket: Bucket, name: str, p: nn.Parameter) -> None:
        """The hook: p's gradient of this micro-batch has come."""
        if not self._open:
            raise RuntimeError(f"a gradient of {name} has come outside of synced()")
        if name not in bucket.missing:
            raise RuntimeError(
                f"{name} has got two gradients in one backward, as happens with re-entrant "
                f"checkpointing; use checkpoint(..., use_reentrant=False)"
            )
        bucket.missing.remove(name)
        self._arrivals.add(name)
        if bucket.full is None:
            bucket.full = bucket.empty_gradients()
        bucket.place(name, bucket.full).add_(p.grad.reshape(-1))
        p.grad = None
        self._reduce_in_turn(lambda bucket: not bucket.missing)

    def _reduce_in_turn(self, ready: Callable[[Bucket], bool]) -> None:
        """Reduce buckets from the one whose turn it is, as long as they are ready.

        Never out of turn: ranks on which other gradients are missing must send in the same order.
        """
        if self.stage == 1 and not self._last:
            return
        while self._next < len(self.buckets) and ready(self.buckets[self._next]):
            self._reduce(self.buckets[self._next])
            self._next += 1

    @torch.no_grad()
    def _reduce(self, bucket: Bucket) -> None:
        """Send a bucket's gradients on their way."""
        while len(self._flying) >= IN_FLIGHT or any(f.bucket is bucket for f in self._flying):
            self._land()
        full = bucket.empty_gradients() if bucket.full is None else bucket.full
        out = torch.empty(bucket.chunk, dtype=bucket.wire, device=full.device)
        work = None
        if self.ranks.size == 1:
            out.copy_(full)
        else:
            work = _reduce_scatter(out, full, group=self._comm, async_op=True)
        if self.stage == 2:
            bucket.full = None
        self._flying.append(Flight(bucket, work, out, full, self._last))

    def _land(self) -> None:
        """Wait for the oldest reduction, and add what it brings to the shard."""
        flight = self._flying.popleft()
        bucket, out = flight.bucket, flight.out
        if flight.work is not None:
            flight.work.wait()  # gloo writes `out` in here
        if self.stage == 1:
            flight.full.zero_()
        if bucket.shard is None:
            bucket.shard = out.to(bucket.master.dtype)
        else:
            bucket.shard.add_(out.to(bucket.shard.device))
        if flight.last and self._lane:
            bucket.shard = self._lane.down(bucket.shard)

    @torch.no_grad()
    def _settle(self) -> set[str]:
        """Wait until every gradient is in its shard; the parameters that have one on some rank."""
        while self._flying:
            self._land()
        if self._lane:
            self._lane.wait()
        return self._arrivals.names()

    @torch.no_grad()
    def squares(self) -> Tensor:
        """Sum of the squares of this rank's gradients, () fp64; over the ranks, of the model's."""
        self._settle()
        shards = [bucket.shard for bucket in self.buckets if bucket.shard is not None]
        return sum_of_squares(shards).to(self.ranks.sums_on)

    @torch.no_grad()
    def step(self, grad_scale: Tensor | None = None) -> None:
        """Move every parameter that has a gradient on some rank, and drop the gradients.

        grad_scale: () factor of the gradients.    Raises RuntimeError if the last micro-batch has
        not been through synced(last=True), or if what was frozen has a gradient.
        """
        if not self._complete:
            raise RuntimeError("step() before a backward in synced(last=True) has ended")
        self.frozen.require_no_gradient()
        arrived = self._settle()
        scaled = "grad_scale" in signature(self.inner.step).parameters
        for bucket in (bucket for bucket in self.buckets if bucket.shard is not None):
            if grad_scale is not None and not scaled:
                bucket.shard.mul_(grad_scale.to(bucket.shard.device))
            give(bucket, bucket.shard, arrived)
        if grad_scale is not None and scaled:
            self.inner.step(grad_scale=grad_scale.cpu() if self._lane else grad_scale)
        else:
            self.inner.step()
        drop(self.buckets)
        self._arrivals.clear()
        self._gather()

    @torch.no_grad()
    def zero_grad(self) -> None:
        """Drop the gradients, as where a step is skipped."""
        self._settle()
        for bucket in self.buckets:
            bucket.full = bucket.empty_gradients() if self.stage == 1 else None
            for p in bucket.parameters.values():
                p.grad = None  # a backward that was broken off may have left one
        self.frozen.forget()
        self._complete = True
        self._arrivals.clear()
        drop(self.buckets)

    @torch.no_grad()
    def _gather(self) -> None:
        """Parameters from everybody's masters."""
        gather = partial(_all_gather, group=self._comm, async_op=True)
        works = []
        for bucket in self.buckets:
            if self._lane:
                self._lane.up(bucket.master, bucket.own)
            elif bucket.master is not bucket.own:
                bucket.own.copy_(bucket.master)
            if self.ranks.size > 1:
                works.append(gather(bucket.flat, bucket.own))
        for work in works:
            work.wait()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter, this rank's elements of its gradient), before the step."""
        arrived = self._settle()
        for bucket in (bucket for bucket in self.buckets if bucket.shard is not None):
            for part in (part for part in bucket.parts if part.name in arrived):
                yield part.name, bucket.shard[part.at : part.at + part.master.numel()]

    def pieces(self) -> Iterator[Piece]:
        """What this rank has of each parameter; over the ranks, every element once."""
        yield from pieces_of(self.buckets, self.inner)
        yield from self.frozen.pieces(self.ranks)

    def load(self, read: Read) -> None:
        """Take masters and state from read(kind, name, start, stop); see pieces.fill.

        The other ranks wait at its end: a `read` that may raise should do so on all of them.
        """
        self.zero_grad()
        fill(self.buckets, self.inner, read)
        self.frozen.load(read)
        self._gather()

    def bytes(self) -> dict[str, int]:
        """Bytes that this rank holds now, by kind; buffers: gradients on their way at stage 2."""
        full, buffers = (
            nbytes(b.full for b in self.buckets),
            nbytes(f.out for f in self._flying),
        )
        if self.stage == 2:
            full, buffers = 0, buffers + full + nbytes(f.full for f in self._flying)
        return {
            "parameters": nbytes(b.flat for b in self.buckets) + nbytes(self.frozen.values()),
            "gradients": full + nbytes(b.shard for b in self.buckets),
            "masters": nbytes(b.master for b in self.buckets if b.master is not b.own),
            "moments": nbytes(x for s in self.inner.state.values() for x in s.values()),
            "buffers": buffers,
        }
