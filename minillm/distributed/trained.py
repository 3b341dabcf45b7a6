"""Keep track of the parameters that a step moves: those not frozen that have a gradient.

Collectives are started in zero.py.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minillm.distributed.pieces import Piece, Read
from minillm.distributed.ranks import Ranks


class Frozen(dict[str, nn.Parameter]):
    """The frozen parameters (requires_grad=False) by name, which an optimiser does not move.

    Every rank holds them whole, in the dtype they had.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__({name: p for name, p in parameters.items() if not p.requires_grad})

    def left_out(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return a group without the frozen parameters and their entries in lists."""
        names = group["params"]
        kept = [i for i, name in enumerate(names) if name not in self]
        return {
            key: [value[i] for i in kept]
            if isinstance(value, list) and len(value) == len(names)
            else value
            for key, value in group.items()
        }

    def require_no_gradient(self) -> None:
        """Raise RuntimeError if a frozen parameter has a gradient, which would have no effect."""
        if odd := [name for name, p in self.items() if p.grad is not None]:
            raise RuntimeError(
                f"{odd[0]} has a gradient, but was frozen when its ZeroOptimizer was made; make "
                "another one after requires_grad is set"
            )

    def forget(self) -> None:
        """Drop the gradients of frozen parameters."""
        for p in self.values():
            p.grad = None

    def pieces(self, ranks: Ranks) -> Iterator[Piece]:
        """Yield the pieces that this rank saves: whole parameters without a state."""
        for name in ranks.own_share(self):
            values = self[name].detach().reshape(-1)
            yield Piece(name, 0, len(values), values, {})

    @torch.no_grad()
    def load(self, read: Read) -> None:
        """Fill the frozen parameters from `read`; one that it does not know does not change."""
        for name, p in self.items():
            if (values := read("model", name, 0, p.numel())) is not None:
                p.copy_(values.view(p.shape))


class Arrivals:
    """The parameters that have a gradient in this step, on this rank or on another.

    names: the parameters that can get one, in the same order on all ranks
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._own: dict[str, bool] = dict.fromkeys(names, False)
        self._flags: Tensor | None = None
        self._work: Any = None

    def add(self, name: str) -> None:
        """Record that this rank has a gradient of the parameter."""
        self._own[name] = True

    def share(self, device: torch.device, send: Callable[[Tensor], Any] | None) -> None:
        """Start to exchange the names between the ranks, after the last backward pass of a step.

        device: device of the tensor that is sent
        send: replaces a tensor by its maximum over the ranks and returns a handle to wait for;
            None: there is one rank
        """
        self.names()  # finish an earlier exchange
        self._flags = torch.tensor(list(self._own.values()), dtype=torch.int32, device=device)
        self._work = send(self._flags) if send and self._own else None

    def names(self) -> set[str]:
        """Return the parameters that have a gradient on some rank; none before `share`."""
        if self._flags is None:
            return set()
        if self._work is not None:
            self._work.wait()
            self._work = None
        flags = self._flags.tolist()
        return {name for name, flag in zip(self._own, flags, strict=True) if flag}

    def clear(self) -> None:
        """Forget the gradients of this step."""
        self.names()  # finish an exchange that has been started
        self._own, self._flags = dict.fromkeys(self._own, False), None
