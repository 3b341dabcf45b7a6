"""Buckets: flat buffers of parameters, in each of which this rank steps one chunk; see layout.py.

A parameter in a bucket is a view of its buffer. One collective therefore moves all parameters of
the bucket, and no weight is copied for it. Collectives are started in zero.py and reductions.py.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minillm.distributed.layout import Layout, Sizes, cut
from minillm.distributed.pieces import Piece, Read

WIDE = (torch.float32, torch.float64)  # dtypes that an optimiser can move by small steps


@dataclass
class Part:
    """Elements [start, stop) of the flattened parameter `name`, which this rank owns.

    at: the element of the chunk at which they begin
    master: these elements in full precision, as the optimiser gets them: 1-D, or in the shape of
        the parameter where parameters are kept whole
    """

    name: str
    start: int
    stop: int
    at: int
    master: nn.Parameter


class Bucket:
    """One flat buffer of parameters, with the masters and gradients of this rank's chunk.

    flat: (ranks * chunk,) the storage of the parameters
    own: (chunk,) this rank's part of `flat`
    master: (chunk,) fp32, or `own` itself where that is wide enough and not offloaded
    wire: the dtype in which gradients are summed
    full: (ranks * chunk,) the gradients of this rank's sequences, in dtype `wire`; None: none yet
    shard: (chunk,) the gradients summed over the ranks, in the dtype of `master`; None: none yet
    missing: names of the parameters whose gradient has not arrived in this backward pass
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        layout: Layout,
        rank: int,
        ranks: int,
        dtype: torch.dtype,
        reduce_dtype: torch.dtype,
        whole: bool,
        offload: bool,
    ) -> None:
        self.offsets, self.chunk = layout.offsets, layout.chunk
        self.parameters = {name: parameters[name] for name in layout.offsets}
        device = next(iter(self.parameters.values())).device
        self.flat = torch.zeros(ranks * layout.chunk, dtype=dtype, device=device)
        self.own = self.flat[rank * layout.chunk : (rank + 1) * layout.chunk]
        self.wire = torch.promote_types(reduce_dtype, dtype)
        self.master = self.own
        if offload or dtype not in WIDE:
            self.master = torch.zeros(
                layout.chunk,
                dtype=dtype if dtype in WIDE else torch.float32,
                device="cpu" if offload else device,
                pin_memory=offload and device.type == "cuda",
            )
        self.parts = [self._move(name, rank * self.chunk, whole) for name in self.parameters]
        self.parts = [part for part in self.parts if part is not None]
        self.full: Tensor | None = None
        self.shard: Tensor | None = None
        self.missing: set[str] = set()

    @torch.no_grad()
    def _move(self, name: str, begin: int, whole: bool) -> Part | None:
        """Move a parameter into the buffer. Return its part in the chunk that begins at `begin`."""
        p, offset = self.parameters[name], self.offsets[name]
        n, values = p.numel(), p.detach().reshape(-1)
        start, stop = (min(max(x - offset, 0), n) for x in (begin, begin + self.chunk))
        own = start < stop or (n == 0 and begin <= offset < begin + self.chunk)
        part, at = None, offset + start - begin
        if own:
            master = self.master[at : at + stop - start]
            # Copied from the original parameter, because the dtype of the buffer may be narrower.
            master.copy_(values[start:stop])
            master = nn.Parameter(master.view(p.shape) if whole else master)
            part = Part(name, start, stop, at, master)
        view = self.flat[offset : offset + n].view(p.shape)
        p.data, p.grad = view.copy_(p.detach()), None
        return part

    def place(self, name: str, gradients: Tensor) -> Tensor:
        """Return the elements of a parameter in a buffer of gradients, 1-D, as a view.

        name: name of the parameter
        gradients: buffer with the layout of `flat`, (ranks * chunk,)
        """
        offset = self.offsets[name]
        return gradients[offset : offset + self.parameters[name].numel()]

    def empty_gradients(self) -> Tensor:
        """Return zeros for `full`."""
        return torch.zeros(len(self.flat), dtype=self.wire, device=self.flat.device)


def make_buckets(
    parameters: dict[str, nn.Parameter],
    names: list[str],
    rank: int,
    ranks: int,
    *,
    dtype: torch.dtype | None,
    reduce_dtype: torch.dtype,
    whole: bool,
    bucket_mb: float,
    offload: bool,
) -> list[Bucket]:
    """Return the buckets of one group of parameters, filled from the last parameter to the first.

    parameters: all parameters, by name
    names: the parameters of the group
    rank: this rank
    ranks: number of ranks
    dtype: dtype in which weights are stored; None: that of each parameter
    reduce_dtype, whole, offload: see zero.ZeroOptimizer
    bucket_mb: size of a bucket's gradients as they are reduced, in MiB
    """
    kinds: dict[tuple, Sizes] = {}
    for name in reversed(names):
        p = parameters[name]
        kinds.setdefault((dtype or p.dtype, p.device), {})[name] = p.numel()
    made = []
    for (kind, _), sizes in kinds.items():
        limit = int(bucket_mb * 2**20 / torch.promote_types(reduce_dtype, kind).itemsize)
        made += [
            Bucket(parameters, layout, rank, ranks, kind, reduce_dtype, whole, offload)
            for layout in cut(sizes, ranks, limit, whole)
        ]
    return made


def pieces_of(buckets: list[Bucket], inner: Optimizer) -> Iterator[Piece]:
    """Yield the pieces of parameters in these buckets, with their states in the inner optimiser.

    buckets: buckets of one group of parameters
    inner: optimiser of the masters, whose states are empty before the first step
    """
    for part in (part for bucket in buckets for part in bucket.parts):
        state = inner.state.get(part.master, {})
        flat = {kind: x.view(-1) if x.dim() else x for kind, x in state.items()}
        yield Piece(part.name, part.start, part.stop, part.master.detach().view(-1), flat)


def inner_group(group: dict[str, Any], buckets: list[Bucket]) -> dict[str, Any]:
    """Return the group of the inner optimiser: this rank's masters in place of the names.

    A list that is as long as the names has an entry for each name. Only the entries of parameters
    that this rank owns elements of are kept.

    group: group of the outer optimiser, with names for "params"
    buckets: buckets of the group
    """
    place = {name: i for i, name in enumerate(group["params"])}
    parts = [part for bucket in buckets for part in bucket.parts]
    inner = dict(group)
    for key, value in group.items():
        if isinstance(value, list) and len(value) == len(place):
            inner[key] = [value[place[part.name]] for part in parts]
    return {**inner, "params": [part.master for part in parts]}


def set_gradients(bucket: Bucket, gradients: Tensor, names: Collection[str]) -> None:
    """Give the masters of these parameters their gradients, for the inner optimiser.

    bucket: bucket of the parameters
    gradients: (chunk,) gradients of this rank's chunk
    names: parameters that get a gradient
    """
    for part in (part for part in bucket.parts if part.name in names):
        p = part.master
        p.grad = gradients[part.at : part.at + p.numel()].view(p.shape)


def drop_gradients(buckets: list[Bucket]) -> None:
    """Drop the gradients of this rank's chunks."""
    for bucket in buckets:
        bucket.shard = None
        for part in bucket.parts:
            part.master.grad = None


def make_state(buckets: list[Bucket], inner: Optimizer) -> None:
    """Make the inner optimiser create its state, by a step with rate 0 on gradients of 0.

    buckets: all buckets of the optimiser
    inner: optimiser of the masters
    """
    rates = [group["lr"] for group in inner.param_groups]
    for group in inner.param_groups:
        group["lr"] = 0.0
    for bucket in buckets:
        set_gradients(bucket, torch.zeros_like(bucket.master), bucket.parameters)
    inner.step()
    for group, rate in zip(inner.param_groups, rates, strict=True):
        group["lr"] = rate
    drop_gradients(buckets)


@torch.no_grad()
def fill_from(buckets: list[Bucket], inner: Optimizer, read: Read) -> None:
    """Fill the masters and the states of the inner optimiser from `read`.

    Masters are read as kind "model". States are read as the kinds that the optimiser names, a state
    of shape () as [0, 1). A master that `read` does not know does not change. If `read` knows no
    state of a parameter, the parameter has no state afterwards, as before its first step.

    buckets: all buckets of the optimiser
    inner: optimiser of the masters
    read: returns saved elements, see pieces.Read
    """
    make_state(buckets, inner)
    parts = [part for bucket in buckets for part in bucket.parts]
    for part, piece in zip(parts, list(pieces_of(buckets, inner)), strict=True):
        values = read("model", piece.name, piece.start, piece.stop)
        if values is not None:
            piece.master.copy_(values.reshape(-1))
        known = False
        for kind, x in piece.state.items():
            start, stop = (piece.start, piece.stop) if x.dim() else (0, 1)
            values = read(kind, piece.name, start, stop)
            x.zero_() if values is None else x.copy_(values.reshape(x.shape))
            known = known or values is not None
        if not known:
            inner.state.pop(part.master, None)
