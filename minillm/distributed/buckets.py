"""Parameters side by side in flat buffers, cut into equal chunks: one for each rank to look after.

    flat     [ a a a a . b b b b b b b . c c c | c c c c c c . d d . . . . . . . ]
              `-------- chunk of rank 0 -------' `-------- chunk of rank 1 -----'

A parameter is from then on a view of its buffer, so that one collective moves them all and nothing
is copied around it. The dots are padding to ALIGN elements; it is zero and stays so.

What this room does not do: collectives, steps (zero.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ALIGN = 64  # elements: every parameter and every chunk begins on a cache line, in any dtype
UNEVEN = 1.25  # a bucket of whole matrices takes more of them while its padding exceeds a quarter
WIDE = (torch.float32, torch.float64)  # dtypes that an optimiser can move by small steps

Sizes = dict[str, int]  # elements of parameters by name, in the order of their gradients


@dataclass(frozen=True)
class Layout:
    """Where parameters lie: offsets in the buffer by name, and the length of a rank's chunk."""

    offsets: Sizes
    chunk: int


def in_a_row(sizes: Sizes, ranks: int) -> Layout:
    """One after another; a chunk's border may run through a parameter."""
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += _aligned(size)
    return Layout(offsets, _aligned(-(-end // ranks)))


def by_owner(sizes: Sizes, ranks: int) -> Layout:
    """Each whole in one chunk: the largest first, always to the rank that has least.

    The chunks are as long as the longest: with fewer parameters than ranks most of it is padding.
    """
    filled, places = [0] * ranks, {}
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        rank = filled.index(min(filled))
        places[name] = rank, filled[rank]
        filled[rank] += _aligned(sizes[name])
    chunk = max(filled)
    return Layout({name: places[name][0] * chunk + places[name][1] for name in sizes}, chunk)


def _aligned(size: int) -> int:
    # An empty parameter takes room too: it must lie inside some rank's chunk to have an owner.
    return max(1, -(-size // ALIGN)) * ALIGN


def cut(sizes: Sizes, ranks: int, limit: int, whole: bool) -> Iterator[Layout]:
    """The layouts of buckets of at most `limit` elements, or of one parameter that has more.

    whole: every parameter in one chunk. Such a bucket also grows, past the limit, until its
    chunks are about evenly filled, or there are no parameters left.
    """
    arrange = by_owner if whole else in_a_row
    members: Sizes = {}
    for name, size in sizes.items():
        total = sum(map(_aligned, members.values()))
        if members and total + size > limit:
            layout = arrange(members, ranks)
            if not whole or layout.chunk * ranks <= UNEVEN * total:
                yield layout
                members = {}
        members[name] = size
    if members:
        yield arrange(members, ranks)


@dataclass
class Part:
    """Elements [start, stop) of the flattened parameter `name`: what this rank owns of it.

    at: where in the chunk they begin.    master: these elements at full precision, 1-D, or in the
    parameter's shape where parameters are kept whole; what the optimiser is given.
    """

    name: str
    start: int
    stop: int
    at: int
    master: nn.Parameter


class Bucket:
    """One flat buffer of parameters and what this rank keeps for its chunk of it.

    flat: (ranks * chunk,), the parameters' storage.    own: (chunk,), this rank's part of it.
    master: (chunk,), fp32, or `own` itself where that is wide enough and not offloaded.
    full: (ranks * chunk,) gradients of this rank's batches, in dtype `wire`; None if there are
    none.    shard: (chunk,) summed gradients in the masters' dtype; None if there are none.
    missing: names whose gradient has not come in this backward.
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
        """Take a parameter into the buffer; what of it lies in the chunk that begins there."""
        p, offset = self.parameters[name], self.offsets[name]
        n, values = p.numel(), p.detach().reshape(-1)
        start, stop = (min(max(x - offset, 0), n) for x in (begin, begin + self.chunk))
        own = start < stop or (n == 0 and begin <= offset < begin + self.chunk)
        part, at = None, offset + start - begin
        if own:
            master = self.master[at : at + stop - start]
            # From the parameter as it was: its narrow copy has lost what the master is kept for.
            master.copy_(values[start:stop])
            master = nn.Parameter(master.view(p.shape) if whole else master)
            part = Part(name, start, stop, at, master)
        view = self.flat[offset : offset + n].view(p.shape)
        p.data, p.grad = view.copy_(p.detach()), None
        return part

    def place(self, name: str, gradients: Tensor) -> Tensor:
        """The elements of a parameter in a buffer like `flat`, 1-D."""
        offset = self.offsets[name]
        return gradients[offset : offset + self.parameters[name].numel()]

    def empty_gradients(self) -> Tensor:
        """Zeros for `full`."""
        return torch.zeros(len(self.flat), dtype=self.wire, device=self.flat.device)


class Flight(NamedTuple):
    """A reduction on its way: `full` of a bucket is being summed into `out`, this rank's chunk.

    work: what to wait for, if anything.    last: whether it is of a step's last micro-batch.
    """

    bucket: Bucket
    work: Any
    out: Tensor
    full: Tensor
    last: bool


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
    """The buckets of one group of parameters, filled from the last of them to the first.

    bucket_mb: 2**20 bytes of gradients as they are reduced. dtype: of storage, None: as it is.
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
