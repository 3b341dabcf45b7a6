"""ZeRO, stages 1 and 2: one optimiser whose state is sharded over the ranks.

    every backward      hooks move each gradient into its bucket
    as buckets fill     reduce-scatter: each rank gets the sum over the ranks of its chunk (stage 1:
                        in the last micro-batch of a step; stage 2: in every micro-batch, after
                        which the buffer is freed)
    step                the optimiser moves this rank's chunk; all-gather: all ranks get all chunks

Bytes on each rank for P parameters on W ranks with AdamW, stored in (fp32 | bf16):
    parameters 4P | 2P,  gradients stage 1: 4P + 4P/W, 2: 4P/W and about three buckets,
    masters 0 | 4P/W,  moments 8P/W; the padding of the buckets is added to these.
Losses must be weighted so that the sum of the gradients over the ranks is the gradient wanted. All
ranks must call the same methods in the same order and begin with equal parameters. For a given
number of ranks results repeat bit for bit.

Source: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from minillm.distributed.buckets import (
    Bucket,
    drop_gradients,
    fill_from,
    inner_group,
    make_buckets,
    pieces_of,
    set_gradients,
)
from minillm.distributed.offload import HostCopies
from minillm.distributed.pieces import Piece, Read, nbytes
from minillm.distributed.ranks import Ranks
from minillm.distributed.reductions import Reductions
from minillm.distributed.trained import Arrivals, Frozen
from minillm.optim.clip import sum_of_squares

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13


class ZeroOptimizer:
    """Any element-wise torch optimiser, or Muon by whole matrices, sharded over the ranks.

    parameters: parameters by name, in the order of the model; those that it moves become views of
        flat buffers. A frozen one (requires_grad=False) stays whole on every rank, without a state.
    groups: groups of an optimiser, but with names for "params"; a list as long as the names, such
        as "parts", has an entry for each name
    make: returns the inner optimiser of such groups over this rank's elements, which are 1-D, or
        whole matrices
    stage: 1 or 2
    dtype: dtype in which parameters are stored; None: each keeps its dtype. If it is narrower than
        fp32, masters are kept in fp32.
    whole: keep each parameter whole on one rank, which Muon needs
    bucket_mb: size of the gradients that travel in one collective, in MiB
    reduce_dtype: dtype in which gradients are summed, unless that of the parameters is wider
    offload: keep masters and the optimiser's state in host memory; `make` builds for the CPU
    group: the process group to send in, which no other optimiser of the same step may use; None: a
        new one

    Raises ValueError if `stage` is another, or if the groups do not name every parameter once.
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
        _check_groups(parameters, groups)
        self.frozen = Frozen(parameters)
        groups = [self.frozen.left_out(group) for group in groups]
        self.ranks, self.stage = ranks, stage
        self._arrivals = Arrivals(n for n in parameters if n not in self.frozen)
        self._comm = ranks.new_group() if group is None else group
        self._host = HostCopies(ranks.device) if offload else None
        self._reductions = Reductions(ranks, stage, self._comm, self._host)
        self._open = self._last = False
        self._complete = True  # False: some micro-batches of a step have come, not all
        self._next = 0  # index of the next bucket to reduce

        by_group = [
            make_buckets(
                parameters, group["params"], ranks.rank, ranks.size, dtype=dtype, whole=whole,
                reduce_dtype=reduce_dtype, bucket_mb=bucket_mb, offload=offload,
            )
            for group in groups
        ]  # fmt: skip
        self.inner = make([inner_group(*pair) for pair in zip(groups, by_group, strict=True)])
        # The gradient of a bucket's earliest parameter comes last: buckets of later ones go first.
        place = {name: i for i, name in enumerate(parameters)}
        self.buckets = sorted(
            (bucket for buckets in by_group for bucket in buckets),
            key=lambda bucket: -min(place[name] for name in bucket.parameters),
        )
        for bucket in self.buckets:
            self._take_gradients_of(bucket)

    def _take_gradients_of(self, bucket: Bucket) -> None:
        """Add hooks that move each gradient of a bucket's parameters into the bucket."""
        if self.stage == 1:
            bucket.full = bucket.empty_gradients()
        for name, p in bucket.parameters.items():
            p.register_post_accumulate_grad_hook(partial(self._take, bucket, name))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the inner optimiser, one for each given; their "lr" may be set."""
        return self.inner.param_groups

    @contextmanager
    def synced(self, last: bool) -> Iterator[None]:
        """Return a context manager for the backward pass of one micro-batch.

        last: whether this is the last micro-batch of the step

        All ranks must make the same number of calls. A gradient that is missing on some ranks
        counts as zero there. Raises RuntimeError if a parameter gets two gradients, or gets one
        outside. After a backward pass that was interrupted, call zero_grad().
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
            self._arrivals.share(self.ranks.device, send if self.ranks.size > 1 else None)
        self._complete = last

    @torch.no_grad()
    def _take(self, bucket: Bucket, name: str, p: nn.Parameter) -> None:
        """Move the gradient of p into its bucket; called when it has been accumulated."""
        if not self._open:
            raise RuntimeError(f"a gradient of {name} has come outside of synced()")
        if name not in bucket.missing:
            raise RuntimeError(
                f"{name} got two gradients in one backward pass, as happens with re-entrant "
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
        """Reduce buckets in their order, up to the first that is not ready.

        The order is the same on all ranks, even where different gradients are missing.
        """
        if self.stage == 1 and not self._last:
            return
        while self._next < len(self.buckets) and ready(self.buckets[self._next]):
            self._reductions.start(self.buckets[self._next], self._last)
            self._next += 1

    @torch.no_grad()
    def _settle(self) -> set[str]:
        """Wait until all gradients are in the shards. Return the parameters that have one."""
        self._reductions.complete()
        return self._arrivals.names()

    @torch.no_grad()
    def squares(self) -> Tensor:
        """Return the sum of the squares of the gradients in this rank's shards, () fp64.

        Its sum over the ranks is the sum of the squares of all gradients.
        """
        self._settle()
        shards = [bucket.shard for bucket in self.buckets if bucket.shard is not None]
        return sum_of_squares(shards).to(self.ranks.sums_on)

    @torch.no_grad()
    def step(self, grad_scale: Tensor | None = None) -> None:
        """Move every parameter that has a gradient on some rank, and drop the gradients.

        grad_scale: () factor of all gradients; None: 1

        Raises RuntimeError if no micro-batch was run in synced(last=True), or if a frozen parameter
        has a gradient.
        """
        if not self._complete:
            raise RuntimeError("step() before a backward pass in synced(last=True) has ended")
        self.frozen.require_no_gradient()
        arrived = self._settle()
        scaled = "grad_scale" in signature(self.inner.step).parameters
        for bucket in (bucket for bucket in self.buckets if bucket.shard is not None):
            if grad_scale is not None and not scaled:
                bucket.shard.mul_(grad_scale.to(bucket.shard.device))
            set_gradients(bucket, bucket.shard, arrived)
        if grad_scale is not None and scaled:
            self.inner.step(grad_scale=grad_scale.cpu() if self._host else grad_scale)
        else:
            self.inner.step()
        drop_gradients(self.buckets)
        self._arrivals.clear()
        self._gather()

    @torch.no_grad()
    def zero_grad(self) -> None:
        """Drop the gradients of a step that is skipped."""
        self._settle()
        for bucket in self.buckets:
            bucket.full = bucket.empty_gradients() if self.stage == 1 else None
            for p in bucket.parameters.values():
                p.grad = None  # an interrupted backward pass may have left one
        self.frozen.forget()
        self._complete = True
        self._arrivals.clear()
        drop_gradients(self.buckets)

    @torch.no_grad()
    def _gather(self) -> None:
        """Copy the masters of all ranks into the parameters."""
        gather = partial(_all_gather, group=self._comm, async_op=True)
        works = []
        for bucket in self.buckets:
            if self._host:
                self._host.up(bucket.master, bucket.own)
            elif bucket.master is not bucket.own:
                bucket.own.copy_(bucket.master)
            if self.ranks.size > 1:
                works.append(gather(bucket.flat, bucket.own))
        for work in works:
            work.wait()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter, this rank's elements of its gradient), before the step."""
        arrived = self._settle()
        for bucket in (bucket for bucket in self.buckets if bucket.shard is not None):
            for part in (part for part in bucket.parts if part.name in arrived):
                yield part.name, bucket.shard[part.at : part.at + part.master.numel()]

    def pieces(self) -> Iterator[Piece]:
        """Yield this rank's pieces of the parameters. Each element comes once over the ranks."""
        yield from pieces_of(self.buckets, self.inner)
        yield from self.frozen.pieces(self.ranks)

    def load(self, read: Read) -> None:
        """Fill masters and states from `read`, see buckets.fill_from.

        All ranks wait for one another at its end, so `read` must raise on all of them or on none.
        """
        self.zero_grad()
        fill_from(self.buckets, self.inner, read)
        self.frozen.load(read)
        self._gather()

    def bytes(self) -> dict[str, int]:
        """Return the bytes that this rank holds now, by kind.

        "buffers" are the gradients of stage 2 that have not been added to the shards yet.
        """
        full = nbytes(bucket.full for bucket in self.buckets)
        results, sent = self._reductions.nbytes()
        full, buffers = (full, results) if self.stage == 1 else (0, results + full + sent)
        return {
            "parameters": nbytes(b.flat for b in self.buckets) + nbytes(self.frozen.values()),
            "gradients": full + nbytes(b.shard for b in self.buckets),
            "masters": nbytes(b.master for b in self.buckets if b.master is not b.own),
            "moments": nbytes(x for s in self.inner.state.values() for x in s.values()),
            "buffers": buffers,
        }


def _check_groups(parameters: dict[str, nn.Parameter], groups: list[dict[str, Any]]) -> None:
    """Raise ValueError unless the groups name every parameter once, and no other."""
    named = [name for group in groups for name in group["params"]]
    if sorted(named) != sorted(parameters) or len(set(parameters.values())) < len(named):
        raise ValueError("groups must name every parameter once, and no other")
