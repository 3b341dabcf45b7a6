"""Pieces: the elements of each parameter that a rank saves, and the source it reads them from."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

# read(kind, name, start, stop) returns elements [start, stop) of the weights of parameter `name`
# (kind "model") or of one of its states, or None if they were not saved.
Read = Callable[[str, str, int, int], Tensor | None]


class TensorSource(Protocol):
    """A source of weights and optimiser states, such as a verified checkpoint.

    folder: its folder, which errors name
    piece: reads elements of one tensor
    """

    folder: Path
    piece: Read

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Return all tensors of a kind ("model", "optimizer") by name."""

    def names(self, kind: str) -> Collection[str]:
        """Return the names of the tensors of a kind."""

    def check_fit(self, kind: str, own: dict[str, Tensor]) -> None:
        """Raise CorruptError unless a kind has the names and shapes of the tensors in `own`.

        kind: "model" or "ema"
        own: tensors to load into, by name
        """


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of the flattened parameter `name`, which this rank saves and loads.

    master: (stop - start,) values of the elements in full precision
    state: states of the elements in the optimiser by kind, each (stop - start,), or () such as a
        step count

    All tensors are views: writing to them changes the parameter and its state.
    """

    name: str
    start: int
    stop: int
    master: Tensor
    state: dict[str, Tensor]


def whole_pieces(parameters: dict[str, Tensor], optimizers: list[Optimizer]) -> Iterator[Piece]:
    """Yield one piece for each parameter, which holds all of it and its state in its optimiser.

    parameters: parameters by name
    optimizers: optimisers of these parameters
    """
    states = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    for name, p in parameters.items():
        state = {
            kind: value.reshape(-1) if value.dim() else value
            for kind, value in states.get(p, {}).items()
        }
        yield Piece(name, 0, p.numel(), p.detach().reshape(-1), state)


def bytes_of(parameters: dict[str, Tensor], optimizers: list[Optimizer]) -> dict[str, int]:
    """Return the bytes of whole parameters, gradients and optimiser states, by kind.

    parameters: parameters by name
    optimizers: optimisers of these parameters
    """
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return {
        "parameters": sum(p.nbytes for p in parameters.values()),
        "gradients": sum(p.grad.nbytes for p in parameters.values() if p.grad is not None),
        "masters": 0,
        "moments": sum(x.nbytes for state in states for x in state.values() if torch.is_tensor(x)),
        "buffers": 0,
    }


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of all tensors together; None counts as no bytes."""
    return sum(x.nbytes for x in tensors if x is not None)
