"""Which parameters a step moves: those that are not frozen and have got a gradient.

This file sends nothing to other ranks itself (zero.py does).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minillm.distributed.pieces import Piece, Read
from minillm.distributed.ranks import Ranks


class Frozen(dict[str, nn.Parameter]):
    """The parameters that an optimiser leaves as they are, by name: requires_grad is False.

    Every rank has them whole, in the dtype that they came in.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__({name: p for name, p in parameters.items() if not p.requires_grad})

    def left_out(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group without them: every list with an entry for each name loses theirs too."""
        names = group["params"]
        kept = [i for i, name in enumerate(names) if name not in self]
        return {
            key: [value[i] for i in kept]
            if isinstance(value, list) and len(value) == len(names)
            else value
            for key, value in group.items()
        }

    def require_no_gradient(self) -> None:
        """Raise RuntimeError if one has got a gradient, which would be passed over in silence."""
        if odd := [name for name, p in self.items() if p.grad is not None]:
            raise RuntimeError(
                f"{odd[0]} has a gradient, but was frozen when its ZeroOptimizer was made; make "
                "another one after requires_grad is set"
            )

    def forget(self) -> None:
        """Drop gradients that came all the same."""
        for p in self.values():
            p.grad = None

    def pieces(self, ranks: Ranks) -> Iterator[Piece]:
        """What this rank saves of them: its share, whole, without a state."""
        for name in ranks.share_of(self):
            values = self[name].detach().reshape(-1)
            yield Piece(name, 0, len(values), values, {})

    @torch.no_grad()
    def load(self, read: Read) -> None:
        """Take all of them from `read`, on every rank; what it does not know stays as it is."""
        for name, p in self.items():
            if (values := read("model", name, 0, p.numel())) is not None:
                p.copy_(values.view(p.shape))


class Arrivals:
    """Which parameters have got a gradient in the step, on this rank or on another.

    names: of all that may get one, in the same order on all ranks.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._own: dict[str, bool] = dict.fromkeys(names, False)
        self._flags: Tensor | None = None
        self._work: Any = None

    def add(self, name: str) -> None:
        """Note that this rank has a gradient of the parameter."""
        self._own[name] = True

    def tell(self, device: torch.device, send: Callable[[Tensor], Any] | None) -> None:
        """Let the other ranks know, at the end of the step's last backward pass.

        send: takes the maximum of a tensor over the ranks in place, and returns what to wait for;
        None: there is one rank.
        """
        self.names()  # of an earlier call
        self._flags = torch.tensor(list(self._own.values()), dtype=torch.int32, device=device)
        self._work = send(self._flags) if send and self._own else None

    def names(self) -> set[str]:
        """The parameters that have a gradient on some rank; none before `tell`."""
        if self._flags is None:
            return set()
        if self._work is not None:
            self._work.wait()
            self._work = None
        flags = self._flags.tolist()
        return {name for name, flag in zip(self._own, flags, strict=True) if flag}

    def clear(self) -> None:
        """Begin another step."""
        self.names()  # what is on its way must come before it is forgotten
        self._own, self._flags = dict.fromkeys(self._own, False), None
