"""KV cache: keys and values of earlier tokens, so that a new token costs one token's work.

The memory is allocated once. Rows may differ in length.
Shapes: B batch, T time, S length of the longest row, C width of the residual stream, G key/value
heads, D head width.
"""

import torch
from torch import Tensor


def slots(depths: tuple[int, int, int], iterations: int) -> int:
    """Return the number of layers whose keys and values are held.

    depths: blocks of prelude, core and coda
    iterations: iterations of the core that are held separately
    """
    prelude, core, coda = depths
    return prelude + iterations * core + coda


class KVCache:
    """KV cache of every layer for a batch of rows.

    It takes 2 slots B capacity G D itemsize bytes, where slots is prelude + iterations core + coda.

    depths: blocks of prelude, core and coda
    iterations: iterations of the core whose keys and values are kept separately; those of later
        iterations replace the last of them
    batch: number of rows
    capacity: positions of each row
    n_kv_head: number of key/value heads
    d_head: head width
    dtype: dtype of keys and values
    device: device of the memory
    warm: whether the core starts each token from the state in which the one before it ended
    Raises ValueError if iterations, batch or capacity is below 1, or if warm is set without a core.

    k, v: attributes; keys and values, (slots, B, capacity, G, D)
    lengths: attribute; number of tokens in each row
    reached: attribute; for each row, the number of iterations for which all its tokens have keys
        and values. Tokens that run more iterations would attend to entries that were never written.
    state: attribute; if warm, the state in which the last token of each row ended, (B, C)
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
        """Return the number of positions of each row."""
        return self.k.shape[2]

    def slot(self, block: int, iteration: int) -> int:
        """Return the first index into k and v for a block.

        block: number of the block
        iteration: iteration, counted from 0, if it is a block of the core
        """
        prelude, core, _ = self.depths
        if block < prelude:
            return block
        if block < prelude + core:
            return block + min(iteration, self.iterations - 1) * core
        return block + (self.iterations - 1) * core

    def equal_lengths(self) -> bool:
        """Return whether all rows hold the same number of tokens."""
        return min(self.lengths) == max(self.lengths)

    def row_view(self, b: int, held: int = 0) -> "KVCache":
        """Return a cache of one row that shares this cache's memory.

        The view has its own length and state; `update_row` copies them back.

        b: number of the row
        held: number of its tokens, from the first on, that the view holds
        """
        reached = self.reached[b] if held else self.iterations
        view = self._with(self.k[:, b : b + 1], self.v[:, b : b + 1], [held], [reached])
        if held and self.state is not None:
            view.state = self.state[b : b + 1]
        return view

    def update_row(self, b: int, view: "KVCache") -> None:
        """Copy the length and state of a view back into its row.

        b: number of the row
        view: result of `row_view` for this row
        """
        self.lengths[b], self.reached[b] = view.lengths[0], view.reached[0]
        if view.state is not None:
            if self.state is None:
                self.state = view.state.new_zeros(len(self.lengths), view.state.shape[-1])
            self.state[b] = view.state[0]

    def _with(self, k: Tensor, v: Tensor, lengths: list[int], reached: list[int]) -> "KVCache":
        """Return a cache of the same layers over other memory."""
        found = object.__new__(KVCache)
        found.depths, found.iterations, found.warm = self.depths, self.iterations, self.warm
        found.k, found.v, found.lengths, found.reached, found.state = k, v, lengths, reached, None
        found._starts = [], None
        return found

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all rows except `rows`, which take this order."""
        index = torch.tensor(rows, device=self.k.device)
        self.k, self.v = self.k[:, index], self.v[:, index]
        self.lengths = [self.lengths[b] for b in rows]
        self.reached = [self.reached[b] for b in rows]
        self.state = None if self.state is None else self.state[index]

    def select_rows(self, rows: list[int]) -> "KVCache":
        """Return a copy of some rows with capacity for one more token."""
        index = torch.tensor(rows, device=self.k.device)
        end = max(self.lengths[b] for b in rows) + 1
        lengths, reached = [self.lengths[b] for b in rows], [self.reached[b] for b in rows]
        return self._with(self.k[:, index, :end], self.v[:, index, :end], lengths, reached)

    def copy_newest(self, cache: "KVCache", mine: list[int], theirs: list[int]) -> None:
        """Copy the newest token of some rows, which `advance` has not counted yet, to a cache.

        cache: cache that is written to
        mine: numbers of the rows in this cache
        theirs: numbers of the same rows in the other cache
        """
        at = [self.lengths[b] for b in mine]
        cache.k[:, theirs, at] = self.k[:, mine, at]
        cache.v[:, theirs, at] = self.v[:, mine, at]

    def repeat_iteration(self, rows: list[int], iteration: int) -> None:
        """Use the keys and values of one iteration for all later ones, for the newest token.

        rows: numbers of the rows
        iteration: last iteration that ran for them, counted from 0
        """
        prelude, core, _ = self.depths
        at = [self.lengths[b] for b in rows]
        for later in range(iteration + 1, self.iterations):
            for block in range(prelude, prelude + core):
                here, there = self.slot(block, iteration), self.slot(block, later)
                self.k[there, rows, at] = self.k[here, rows, at]
                self.v[there, rows, at] = self.v[here, rows, at]

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write T new tokens after the last of each row; return the layer's keys and values.

        These are (B, S, G, D) each, where S includes the new tokens. The lengths change only with
        `advance`, after all layers have written.

        layer: result of `slot`
        k: keys, (B, T, G, D)
        v: values, (B, T, G, D)
        """
        T = k.shape[1]
        into_k, into_v = self.entries(layer, T)
        if self.equal_lengths():
            into_k[:, -T:] = k
            into_v[:, -T:] = v
        else:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            columns = self.positions(T)
            into_k[rows, columns] = k.to(self.k.dtype)
            into_v[rows, columns] = v.to(self.v.dtype)
        return into_k, into_v

    def entries(self, layer: int, T: int) -> tuple[Tensor, Tensor]:
        """Return views of the layer's keys and values with T more tokens, (B, S, G, D) each.

        layer: result of `slot`
        T: number of new tokens
        Raises ValueError if the cache is too small for them.
        """
        end = max(self.lengths) + T
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions; {end} are needed")
        return self.k[layer, :, :end], self.v[layer, :, :end]

    def next_positions(self) -> Tensor | int:
        """Return the position of each row's next token: (B,) int64, or one number if all agree."""
        if self.equal_lengths():
            return self.lengths[0]
        if self._starts[0] != self.lengths:  # sent to the device once a token, not once a layer
            self._starts = list(self.lengths), torch.tensor(self.lengths, device=self.k.device)
        return self._starts[1]

    def positions(self, T: int) -> Tensor:
        """Return the positions of the next T tokens of each row, (B, T) int64."""
        device = self.k.device
        starts = self.next_positions()
        if isinstance(starts, int):
            starts = torch.full((len(self.lengths),), starts, device=device)
        return starts[:, None] + torch.arange(T, device=device)

    def advance(self, T: int, iterations: int | None = None) -> None:
        """Count T tokens, after every layer has written them.

        T: number of tokens
        iterations: iterations of the core that ran for them; default: all that the cache keeps
        """
        if iterations is not None:
            self.reached = [min(before, iterations) for before in self.reached]
        self.lengths = [length + T for length in self.lengths]
