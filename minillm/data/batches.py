"""Batches and evaluation windows of a prepared corpus, as pure functions of step and index.

A window is seq_len + 1 tokens. Its first seq_len tokens are the inputs, its last seq_len tokens the
targets. Each epoch has every window once, in another order and from another offset, so that over
the epochs every token except the very first is a target. Tokens are read with ordinary reads, not
from a memory map: a mapped file that is truncated kills the process.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minillm.data.shards import BLOCK, TARGETS, Corpus, Shard
from minillm.errors import CorruptError, UsageError, parameter
from minillm.runtime.files import naming

IGNORED = -100  # the target that cross-entropy leaves out
ROUNDS = 6
ORDER = 2  # the order in which new runs read their data


class Tokens:
    """The tokens, or the targets, of one split as one sequence over all of its shards.

    Each block of a shard is checked against its sha256 when it is first read. No file is kept open
    between calls.

    corpus: the prepared corpus
    split: "train" or "val"
    targets: True for the corpus's own targets in place of its tokens
    """

    def __init__(self, corpus: Corpus, split: str, targets: bool = False) -> None:
        self._shards = (corpus.targets if targets else corpus.shards)[split]
        self._dtype = TARGETS if targets else np.dtype(corpus.dtype).newbyteorder("<")
        self._starts = np.cumsum([0] + [shard.tokens for shard in self._shards])
        self._checked: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Return consecutive tokens as (count,) int64.

        start: index of the first token
        count: number of tokens
        Raises CorruptError if a block is damaged.
        """
        if not 0 <= start <= start + count <= len(self):
            raise ValueError(f"tokens {start} to {start + count} of {len(self)}")
        found = []
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while count:
            first = start - int(self._starts[number])
            here = min(count, self._shards[number].tokens - first)
            found.append(self._read_shard(number, first, here))
            start, count, number = start + here, count - here, number + 1
        return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)

    def _read_shard(self, number: int, first: int, count: int) -> np.ndarray:
        shard, size = self._shards[number], self._dtype.itemsize
        begin, end = first * size, (first + count) * size
        blocks = range(begin // BLOCK, (end - 1) // BLOCK + 1)
        try:
            with naming(shard.path), shard.path.open("rb", buffering=0) as file:
                for block in blocks:
                    if (number, block) not in self._checked:
                        file.seek(block * BLOCK)
                        _check(shard, block, file.read(BLOCK))
                        self._checked.add((number, block))
                file.seek(begin)
                data = file.read(end - begin)
        except FileNotFoundError:
            raise CorruptError(f"{shard.path}: is missing; prepare the corpus again") from None
        if len(data) != end - begin:
            raise CorruptError(f"{shard.path}: ends before byte {end}; prepare the corpus again")
        return np.frombuffer(data, self._dtype)


class Batches:
    """Training batches; the same corpus, sizes and seed give the same batches on any machine.

    corpus: the prepared corpus
    seq_len: number of tokens of a sequence
    batch_size: number of sequences of a batch over all ranks
    seed: random seed of the order
    world_size: number of ranks that share a batch
    order: version of the data order; runs that began with version 1 keep it when they resume
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_len: int,
        batch_size: int,
        seed: int,
        world_size: int = 1,
        order: int = ORDER,
    ) -> None:
        if batch_size % world_size:
            raise UsageError(
                f"{parameter('batch_size')} {batch_size} is not a multiple of {world_size} ranks"
            )
        self._tokens = Tokens(corpus, "train")
        self._targets = Tokens(corpus, "train", targets=True) if corpus.sequence else None
        n = len(self._tokens)
        if n < seq_len + (not corpus.sequence):
            raise UsageError(
                f"{corpus.folder}: the training split has {n} tokens, one sequence takes "
                f"{seq_len + 1}; give more text or {parameter('seq_len')} {max(1, n // 8)}"
            )
        self._seq_len, self._batch_size = seq_len, batch_size
        self._seed, self._world_size = seed, world_size
        if corpus.sequence:  # windows are the corpus's sequences
            _check_sequence(corpus, seq_len)
            self.n_windows, self._n_offsets = n // seq_len, 1
        else:  # the windows that fit after any offset below seq_len; at least one
            self.n_windows = max(1, (n - seq_len) // seq_len)
            # With the largest offset the last window ends where the split ends.
            self._n_offsets = n - self.n_windows * seq_len
            if order == 1:  # version 1 never used the last tokens
                self._n_offsets = min(seq_len, self._n_offsets)

    def batch(self, step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
        """Return a rank's share of a batch as tokens and targets.

        The shares of all ranks, one after the other, are the batch of a single rank.

        step: number of the batch, from 0
        rank: number of the rank, from 0
        Returns two tensors of (batch_size / ranks, seq_len) int64.
        """
        if not 0 <= rank < self._world_size:
            raise ValueError(f"rank {rank} of {self._world_size}")
        rows = self._batch_size // self._world_size
        first = step * self._batch_size + rank * rows
        windows = self._starts(np.arange(first, first + rows, dtype=np.int64)).tolist()
        if self._targets is not None:
            both = self._tokens, self._targets
            x, y = (np.stack([part.read(w, self._seq_len) for w in windows]) for part in both)
            return torch.from_numpy(x), torch.from_numpy(y)
        x = np.stack([self._tokens.read(start, self._seq_len + 1) for start in windows])
        x = torch.from_numpy(x)  # (rows, seq_len + 1)
        return x[:, :-1].contiguous(), x[:, 1:].contiguous()

    def epochs(self, steps: int) -> float:
        """Return the number of passes over the training split that `steps` steps make."""
        return steps * self._batch_size / self.n_windows

    def _starts(self, sequence: np.ndarray) -> np.ndarray:
        """Return the first token of each sequence; sequences count from the start of training."""
        starts = np.empty_like(sequence)
        epochs = sequence // self.n_windows
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            keys = np.random.SeedSequence([self._seed, epoch]).generate_state(8, np.uint64)
            offset = int(keys[-1]) % self._n_offsets
            window = permute(sequence[here] % self.n_windows, self.n_windows, keys[:ROUNDS])
            starts[here] = window * self._seq_len + offset
        return starts


class EvaluationWindows(Sequence[tuple[Tensor, Tensor]]):
    """Windows of one split, as (tokens, targets) of (seq_len,) int64 each; see evaluation_windows.

    tokens: the tokens of the split
    seq_len: number of tokens of a window
    numbers: numbers of the windows
    targets: the corpus's own targets, if it has them
    """

    def __init__(
        self, tokens: Tokens, seq_len: int, numbers: Sequence[int], targets: Tokens | None = None
    ) -> None:
        self._tokens, self._seq_len, self._numbers = tokens, seq_len, numbers
        self._targets = targets

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return window `index`; raise IndexError beyond the end."""
        start = self._numbers[index] * self._seq_len
        if self._targets is not None:
            both = (part.read(start, self._seq_len) for part in (self._tokens, self._targets))
            return tuple(map(torch.from_numpy, both))
        count = min(self._seq_len + 1, len(self._tokens) - start)
        x = torch.from_numpy(self._tokens.read(start, count))
        tokens = torch.zeros(self._seq_len, dtype=torch.int64)
        targets = torch.full((self._seq_len,), IGNORED, dtype=torch.int64)
        tokens[: count - 1], targets[: count - 1] = x[:-1], x[1:]
        return tokens, targets


def evaluation_windows(
    corpus: Corpus, split: str, seq_len: int, limit: int | None = None
) -> EvaluationWindows:
    """Return windows in which each token of a split, except its first, is a target exactly once.

    The last window is filled up with targets of IGNORED. If the corpus has its own targets, the
    windows are its sequences.

    corpus: the prepared corpus
    split: "train" or "val"
    seq_len: number of tokens of a window
    limit: largest number of windows, spread evenly over the split; None for all
    """
    tokens = Tokens(corpus, split)
    if len(tokens) < 2:
        raise UsageError(
            f"{corpus.folder}: the {split} split has {len(tokens)} tokens, too few to evaluate on; "
            f"prepare the corpus again with a larger {parameter('val_fraction')}"
        )
    targets = None
    total = -(-(len(tokens) - 1) // seq_len)
    if corpus.sequence:
        _check_sequence(corpus, seq_len)
        targets, total = Tokens(corpus, split, targets=True), len(tokens) // seq_len
    few = limit is not None and limit < total
    numbers = [i * total // limit for i in range(limit)] if few else range(total)
    return EvaluationWindows(tokens, seq_len, numbers, targets)


def _check_sequence(corpus: Corpus, seq_len: int) -> None:
    if seq_len != corpus.sequence:
        raise UsageError(
            f"{parameter('seq_len')} {seq_len}: the sequences of {corpus.folder} are "
            f"{corpus.sequence} tokens long; leave it out"
        )


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Apply a pseudorandom permutation of 0 ... n-1 to each index, without a table of n entries.

    A Feistel network permutes the numbers of an even count of bits. A result of n or more is put
    through it again.

    index: (N,) int64 below n
    n: number of values that are permuted
    keys: (ROUNDS,) uint64, which select the permutation
    Returns (N,) int64.
    Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains", section 3.
    """
    # At least 6 bits: with fewer, most keys give one of a few orders.
    half = max(3, ((n - 1).bit_length() + 1) // 2)
    x = _feistel(index.astype(np.uint64), half, keys)
    while (beyond := x >= n).any():
        x[beyond] = _feistel(x[beyond], half, keys)
    return x.astype(np.int64)


def warnings_for(n_train_tokens: int, tokens_to_see: int, n_parameters: int) -> list[str]:
    """Return warnings for the user if a run has too little data.

    More than about four passes over the same text bring little: Muennighoff et al. 2023,
    arXiv:2305.16264.

    n_train_tokens: number of tokens of the training split
    tokens_to_see: number of tokens that the run trains on
    n_parameters: number of parameters of the model
    """
    found = []
    passes = tokens_to_see / max(1, n_train_tokens)
    if passes > 4:
        found.append(
            f"the run passes {passes:.1f} times over its {n_train_tokens} training tokens; more "
            "than about 4 teach little, and the model may learn the text by heart"
        )
    if n_train_tokens < n_parameters:
        found.append(
            f"{n_train_tokens} training tokens are fewer than the {n_parameters} parameters; "
            "a smaller model or more text would do better"
        )
    return found


def _check(shard: Shard, block: int, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != shard.sha256[block]:
        raise CorruptError(
            f"{shard.path}: block {block} (from byte {block * BLOCK}) is damaged: its sha256 is "
            "not the index's; delete the folder and prepare the corpus again"
        )


def _feistel(x: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = x >> shift, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    # The finaliser of SplitMix64 (Steele, Lea & Flood 2014); products wrap at 2^64 on purpose.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
