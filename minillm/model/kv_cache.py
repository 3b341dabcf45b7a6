"""Keys and values of the past, so that a new token costs one token's work.

Allocated once; a row may be shorter than its neighbours. What this room does not do: attend.
"""

import torch
from torch import Tensor


def slots(depths: tuple[int, int, int], iterations: int) -> int:
    """How many layers' keys and values are held: each block's, of the core's each iteration's."""
    prelude, core, coda = depths
    return prelude + iterations * core + coda


class KVCache:
    """Room for `capacity` positions of every layer in a batch of rows.

    depths: blocks of prelude, core and coda.    iterations: of the core whose keys and values are
    kept, each apart; later ones are written over the last of them.
    warm: whether the core starts each token from the state of the one before it: `state`, (B, C),
    which the model keeps here.
    k, v: (slots, B, capacity, G, D), prelude + iterations x core + coda slots.    lengths: entries
    held by each row, in tokens.    reached: of each row, the iterations of which all its entries
    have keys and values; with more than these, tokens would attend to what was never written.
    Raises ValueError if iterations, batch or capacity is below 1, or if it is warm without a core.
    Memory: 2 slots B capacity G D itemsize bytes.
    """

    def __init__(
        self,
        depths: tuple[int, int, int],
        iterations: int,
        batch: int,
        capacity: int,
        n_kv_head: int,
        d_head: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        warm: bool = False,
    ) -> None:
        sizes = {"recurrence": iterations, "batch": batch, "capacity": capacity}
        if small := [name for name, size in sizes.items() if size < 1]:
            raise ValueError(f"{small[0]} {sizes[small[0]]}: expected 1 or more")
        if warm and not depths[1]:
            raise ValueError("warm: the model has no core to run again")
        self.depths, self.iterations, self.warm = depths, iterations, warm
        self.state: Tensor | None = None
        shape = (slots(depths, iterations), batch, capacity, n_kv_head, d_head)
        # zeros, not empty: a masked key still meets a weight of 0, and 0 * NaN is NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths, self.reached = [0] * batch, [iterations] * batch
        self._starts: tuple[list[int], Tensor | None] = [], None

    @property
    def capacity(self) -> int:
        """Positions a row can hold."""
        return self.k.shape[2]

    def slot(self, block: int, iteration: int) -> int:
        """Where the keys and values of a block, in an iteration of the core, are held."""
        prelude, core, _ = self.depths
        if block < prelude:
            return block
        if block < prelude + core:
            return block + min(iteration, self.iterations - 1) * core
        return block + (self.iterations - 1) * core

    def uniform(self) -> bool:
        """Whether all rows hold equally many entries."""
        return min(self.lengths) == max(self.lengths)

    def row(self, b: int, held: int = 0) -> "KVCache":
        """Row b alone with its first `held` entries, sharing this cache's memory.

        The view counts for itself: `take_back` what it comes to.
        """
        reached = self.reached[b] if held else self.iterations
        view = self._with(self.k[:, b : b + 1], self.v[:, b : b + 1], [held], [reached])
        if held and self.state is not None:
            view.state = self.state[b : b + 1]
        return view

    def take_back(self, b: int, view: "KVCache") -> None:
        """Row b is now what its view, see `row`, has become."""
        self.lengths[b], self.reached[b] = view.lengths[0], view.reached[0]
        if view.state is not None:
            if self.state is None:
                self.state = view.state.new_zeros(len(self.lengths), view.state.shape[-1])
            self.state[b] = view.state[0]

    def _with(self, k: Tensor, v: Tensor, lengths: list[int], reached: list[int]) -> "KVCache":
        """A cache of the same layers over other memory."""
        found = object.__new__(KVCache)
        found.depths, found.iterations, found.warm = self.depths, self.iterations, self.warm
        found.k, found.v, found.lengths, found.reached, found.state = k, v, lengths, reached, None
        found._starts = [], None
        return found

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these, in this order."""
        index = torch.tensor(rows, device=self.k.device)
        self.k, self.v = self.k[:, index], self.v[:, index]
        self.lengths = [self.lengths[b] for b in rows]
        self.reached = [self.reached[b] for b in rows]
        self.state = None if self.state is None else self.state[index]

    def chosen(self, rows: list[int]) -> "KVCache":
        """A copy of these rows, with room for one more entry, to go on with while others rest."""
        index = torch.tensor(rows, device=self.k.device)
        end = max(self.lengths[b] for b in rows) + 1
        lengths, reached = [self.lengths[b] for b in rows], [self.reached[b] for b in rows]
        return self._with(self.k[:, index, :end], self.v[:, index, :end], lengths, reached)

    def give_back(self, cache: "KVCache", mine: list[int], theirs: list[int]) -> None:
        """Copy the newest entries of rows `mine`, not yet counted, to rows `theirs` of `cache`."""
        at = [self.lengths[b] for b in mine]
        cache.k[:, theirs, at] = self.k[:, mine, at]
        cache.v[:, theirs, at] = self.v[:, mine, at]

    def repeat_iteration(self, rows: list[int], iteration: int) -> None:
        """The newest entries of rows, not yet counted, stay in later iterations what they were."""
        prelude, core, _ = self.depths
        at = [self.lengths[b] for b in rows]
        for later in range(iteration + 1, self.iterations):
            for block in range(prelude, prelude + core):
                here, there = self.slot(block, iteration), self.slot(block, later)
                self.k[there, rows, at] = self.k[here, rows, at]
                self.v[there, rows, at] = self.v[here, rows, at]

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put T new entries after each row's last; return the layer's k, v with them.

        k, v: (B, T, G, D).    Returns (B, S, G, D) each, S the longest row's new length.
        The rows' lengths move on only with `advance`, once all layers have written.
        """
        T = k.shape[1]
        into_k, into_v = self.room(layer, T)
        if self.uniform():
            into_k[:, -T:] = k
            into_v[:, -T:] = v
        else:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            columns = self.positions(T)
            into_k[rows, columns] = k.to(self.k.dtype)
            into_v[rows, columns] = v.to(self.v.dtype)
        return into_k, into_v

    def room(self, layer: int, T: int) -> tuple[Tensor, Tensor]:
        """The layer's k, v, (B, S, G, D) each, up to the longest row's end after T more entries.

        Raises ValueError if the cache is too small for them.
        """
        end = max(self.lengths) + T
        if end > self.capacity:
            raise ValueError(f"cache holds {self.capacity} positions; {end} are asked for")
        return self.k[layer, :, :end], self.v[layer, :, :end]

    def starts(self) -> Tensor | int:
        """Where each row's next entry stands: (B,), or one number if the rows are equally long."""
        if self.uniform():
            return self.lengths[0]
        if self._starts[0] != self.lengths:  # told to the device once a token, not once a layer
            self._starts = list(self.lengths), torch.tensor(self.lengths, device=self.k.device)
        return self._starts[1]

    def positions(self, T: int) -> Tensor:
        """(B, T): where the next T entries of each row stand."""
        device = self.k.device
        starts = self.starts()
        if isinstance(starts, int):
            starts = torch.full((len(self.lengths),), starts, device=device)
        return starts[:, None] + torch.arange(T, device=device)

    def advance(self, T: int, iterations: int | None = None) -> None:
        """Count the T entries that every layer has written.

        iterations: how often the core ran for them; default: as often as there is a place for.
        """
        if iterations is not None:
            self.reached = [min(before, iterations) for before in self.reached]
        self.lengths = [length + T for length in self.lengths]
