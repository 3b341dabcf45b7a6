"""Keep the rows that are decoded together, and the part of each that the model has read.

Past seq_len the context of a row is cut to its last half, see `DecodingBatch`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.inference.checks import CoreOptions
from minillm.inference.early_exit import read_next
from minillm.model.gpt import GPT
from minillm.model.kv_cache import KVCache
from minillm.model.recurrence import state_keys

Stop = Callable[[int, list[int]], bool]


@dataclass(frozen=True)
class Token:
    """A new token of one row.

    row: number of the prompt
    id: the token
    logprob: its natural log-probability under the model itself, without temperature and filters
    recurrence: iterations of the core that were used for it; None without a core
    """

    row: int
    id: int
    logprob: float
    recurrence: int | None = None


class DecodingBatch:
    """Rows of tokens that are continued in step, with their KV cache.

    A row of more than seq_len tokens is cut to its last seq_len // 2 (at least 1). These are read
    again from position 0, and the row grows from there. Without a cache the same tokens are read
    for every new token.

    rows: numbers of the rows that have not ended
    texts: tokens of each row, the prompt's and the new ones
    new: new tokens of each row
    samples: sample number of each row, on which its random numbers depend
    cache: keys and values of what has been read; None before the first read, or without a cache
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        samples: Sequence[int] | None,
        seed: int,
        core: CoreOptions,
        use_cache: bool = True,
    ) -> None:
        self.model, self.seed, self.core, self.use_cache = model, seed, core, use_cache
        self.rows = list(range(len(prompts)))
        self.samples = self.rows.copy() if samples is None else list(samples)
        self.texts = [list(prompt) for prompt in prompts]
        self.new: list[list[int]] = [[] for _ in prompts]
        self.starts = dict.fromkeys(self.rows, 0)
        for row, text in enumerate(self.texts):
            if len(text) > model.config.seq_len:
                self.starts[row] = len(text) - kept_at_the_end(model)
        self.cache: KVCache | None = None
        self.device = model.head.weight.device
        self._iterations: list[int] | None = None
        self._ended: set[int] = set()

    def next_logits(self) -> Tensor:
        """Return the logits, (rows, V), of the token after each row's text."""
        cut, self._iterations = self._cut(), None
        core, count = self.core, range(len(self.rows))
        if not self.use_cache:
            return torch.cat([self._logits(self._unread(r, 0), None, [r]) for r in self.rows])
        if self.cache is None:
            self.cache = self.model.make_cache(
                len(count), None, core.kept_iterations, core.warm_start
            )
            return torch.cat([self._read(i, held=0) for i in count])
        if cut:
            # Once in seq_len / 2 tokens; the other rows are then read one by one, too.
            self._iterations = [core.recurrence] * len(self.rows)
            return torch.cat([self._read_alone(i, self.rows[i] in cut) for i in count])
        last = torch.tensor([[self.texts[row][-1]] for row in self.rows], device=self.device)
        if core.exit_rule is None:
            return self._logits(last, self.cache, self.rows)
        keys = self.keys(self.rows)
        found = read_next(self.model, last, self.cache, core.exit_rule, core.recurrence, keys)
        logits, self._iterations = found
        return logits

    def iterations(self) -> list[int | None]:
        """Return how often the core ran for each row's last logits."""
        return self._iterations or [self.core.recurrence] * len(self.rows)

    def append(self, row: int, token: int, most: int, stop: Stop | None) -> bool:
        """Add a new token to a row; return whether the row has ended.

        row: number of the row
        token: its id
        most: number of new tokens with which a row ends
        stop: stop(row, its new tokens) returns whether the row ends here
        """
        self.texts[row].append(token)
        self.new[row].append(token)
        # With a document mask, tokens after BOS would not see the text before it.
        bos = self.model.config.document_mask and token == self.model.config.bos_id
        stops = stop is not None and stop(row, self.new[row])
        if bos or stops or len(self.new[row]) == most:
            self._ended.add(row)
        return row in self._ended

    def drop_ended(self) -> None:
        """Drop the rows that have ended, and their share of the cache."""
        kept = [i for i, row in enumerate(self.rows) if row not in self._ended]
        if len(kept) < len(self.rows):
            self.rows = [self.rows[i] for i in kept]
            if self.cache is not None and kept:
                self.cache.keep_rows(kept)

    def keys(self, rows: list[int]) -> Tensor:
        """Return the keys, (rows,) int64, of the start states of these rows."""
        samples = torch.tensor([self.samples[r] for r in rows], device=self.device)
        return state_keys(self.seed, samples)

    def _cut(self) -> set[int]:
        """Move the start of the rows that have outgrown seq_len; return those rows."""
        longest = self.model.config.seq_len
        cut = {r for r in self.rows if len(self.texts[r]) - self.starts[r] > longest}
        for row in cut:
            self.starts[row] = len(self.texts[row]) - kept_at_the_end(self.model)
        return cut

    def _unread(self, row: int, held: int) -> Tensor:
        return torch.tensor([self.texts[row][self.starts[row] + held :]], device=self.device)

    def _read_alone(self, i: int, cut: bool) -> Tensor:
        """Return the i-th row's next logits, (1, V); a row that was cut is read again."""
        held, rule = 0 if cut else self.cache.lengths[i], self.core.exit_rule
        if cut or rule is None:
            return self._read(i, held)
        row, cache = self.rows[i], self.cache.row_view(i, held)
        last, keys = self._unread(row, held), self.keys([row])
        logits, steps = read_next(self.model, last, cache, rule, self.core.recurrence, keys)
        self.cache.update_row(i, cache)
        self._iterations[i] = steps[0]
        return logits

    def _read(self, i: int, held: int) -> Tensor:
        """Read the i-th row after the first `held` tokens, which its cache keeps; (1, V)."""
        cache = self.cache.row_view(i, held)
        row = self.rows[i]
        logits = self._logits(self._unread(row, held), cache, [row])
        self.cache.update_row(i, cache)
        return logits

    def _logits(self, tokens: Tensor, cache: KVCache | None, rows: list[int]) -> Tensor:
        x = self.model.trunk(tokens, cache, self.core.recurrence, self.keys(rows))
        return self.model.logits(x[:, -1])


def kept_at_the_end(model: GPT) -> int:
    """Return how many tokens of a text are read again when it has outgrown seq_len."""
    return max(1, model.config.seq_len // 2)
