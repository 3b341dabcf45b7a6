"""What a rank has of each parameter: for its optimiser to step, for a checkpoint to keep.

What this room does not do: collectives (zero.py), files (checkpoint.py).
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from minillm.distributed.buckets import Bucket

# read(kind, name, start, stop): elements [start, stop) of that state of a parameter; None: unknown.
Read = Callable[[str, str, int, int], Tensor | None]


class TensorSource(Protocol):
    """Where weights and optimiser states are read from; a verified checkpoint is one.

    folder: named in errors
    tensors: returns all tensors of a kind ("model", "optimizer") by name
    piece: returns elements of one tensor, see Read
    names: returns the names of the tensors of a kind
    check_fit: raises CorruptError unless a kind has the names and shapes of the tensors given
    """

    folder: Path
    tensors: Callable[[str], dict[str, Tensor]]
    piece: Read
    names: Callable[[str], Collection[str]]
    check_fit: Callable[[str, dict[str, Tensor]], None]


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of the flattened parameter `name`, which this rank looks after.

    master: (stop - start,) at full precision.    state: the inner optimiser's, each (stop - start,)
    or (), such as a count of steps. All are views: what is written there is so.
    """

    name: str
    start: int
    stop: int
    master: Tensor
    state: dict[str, Tensor]


def pieces_of(buckets: list[Bucket], inner: Optimizer) -> Iterator[Piece]:
    """The pieces in these buckets; `state` is empty before the first step."""
    for part in (part for bucket in buckets for part in bucket.parts):
        state = inner.state.get(part.master, {})
        flat = {kind: x.view(-1) if x.dim() else x for kind, x in state.items()}
        yield Piece(part.name, part.start, part.stop, part.master.detach().view(-1), flat)


def inner_group(group: dict[str, Any], buckets: list[Bucket]) -> dict[str, Any]:
    """The inner optimiser's group: this rank's elements where `group` has names.

    A list as long as the names has an entry for each; it is cut to those that are here.
    """
    place = {name: i for i, name in enumerate(group["params"])}
    parts = [part for bucket in buckets for part in bucket.parts]
    inner = dict(group)
    for key, value in group.items():
        if isinstance(value, list) and len(value) == len(place):
            inner[key] = [value[place[part.name]] for part in parts]
    return {**inner, "params": [part.master for part in parts]}


def give(bucket: Bucket, gradients: Tensor, names: Collection[str]) -> None:
    """Let the inner optimiser see those of `gradients` (chunk,) that are of these parameters."""
    for part in (part for part in bucket.parts if part.name in names):
        p = part.master
        p.grad = gradients[part.at : part.at + p.numel()].view(p.shape)


def drop(buckets: list[Bucket]) -> None:
    """Forget the gradients of the chunks."""
    for bucket in buckets:
        bucket.shard = None
        for part in bucket.parts:
            part.master.grad = None


def make_state(buckets: list[Bucket], inner: Optimizer) -> None:
    """Have the inner optimiser make its state: by a step of no length on no gradient."""
    rates = [group["lr"] for group in inner.param_groups]
    for group in inner.param_groups:
        group["lr"] = 0.0
    for bucket in buckets:
        give(bucket, torch.zeros_like(bucket.master), bucket.parameters)
    inner.step()
    for group, rate in zip(inner.param_groups, rates, strict=True):
        group["lr"] = rate
    drop(buckets)


@torch.no_grad()
def fill(buckets: list[Bucket], inner: Optimizer, read: Read) -> None:
    """Fill masters (kind "model") and states (kinds as the optimiser calls them) from `read`.

    A state of () is asked for as [0, 1). Where `read` knows nothing a master stays as it is, and
    a parameter of which it knows no state has none, as before its first step.
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


def whole_pieces(parameters: dict[str, Tensor], optimizers: list[Optimizer]) -> Iterator[Piece]:
    """Whole parameters and their optimisers' states."""
    states = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    for name, p in parameters.items():
        state = {
            kind: value.reshape(-1) if value.dim() else value
            for kind, value in states.get(p, {}).items()
        }
        yield Piece(name, 0, p.numel(), p.detach().reshape(-1), state)


def bytes_of(parameters: dict[str, Tensor], optimizers: list[Optimizer]) -> dict[str, int]:
    """Bytes of parameters, gradients and the optimisers' states, which are their own masters."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return {
        "parameters": sum(p.nbytes for p in parameters.values()),
        "gradients": sum(p.grad.nbytes for p in parameters.values() if p.grad is not None),
        "masters": 0,
        "moments": sum(x.nbytes for state in states for x in state.values() if torch.is_tensor(x)),
        "buffers": 0,
    }


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of all tensors that are there."""
    return sum(x.nbytes for x in tensors if x is not None)
