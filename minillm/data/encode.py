"""Encode documents as token ids, in this process or in several workers, with the same result.

Workers encode batches of about PIECE characters, and the results come back in order. Only a few
batches are in memory at a time. This file imports no torch, so that a worker starts fast where it
is not forked (on all systems but Linux).
"""

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillm.data.bpe import LINE_LIMIT
from minillm.data.tokenizer import Tokenizer, load_tokenizer
from minillm.errors import UnavailableError, parameter

# A multiple of LINE_LIMIT, so that a long line is split at the same positions in any case.
PIECE = 16 * LINE_LIMIT
# For fewer bytes, starting processes takes longer than they save.
POOL_BYTES = 4_000_000


class Piece(NamedTuple):
    """Part of a document, its side of the split, and whether the document starts here."""

    split: str
    is_start: bool
    text: str


def encode(
    parts: Iterable[tuple[str, str]], tokenizer: Tokenizer, file: Path, workers: int
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Stream the ids of each batch, {split: (N,) uint32}, with the number of its UTF-8 bytes.

    Each document begins with BOS, if the tokenizer has it.

    parts: (split, text) of each document, or part of one
    tokenizer: the tokenizer, for this process
    file: the tokenizer's file, which each worker loads
    workers: number of processes; 1 encodes in this process. The ids do not depend on it.
    """
    batches = _batches(parts, tokenizer.by_lines)
    if workers == 1:
        return (encode_batch(tokenizer, batch) for batch in batches)
    return _encode_in_pool(batches, file, workers)


def choose_workers(n_bytes: int) -> int:
    """Return the number of cores that this process may use, or 1 if there is little text."""
    if n_bytes < POOL_BYTES:
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encode_batch(tokenizer: Tokenizer, batch: list[Piece]) -> tuple[dict[str, np.ndarray], int]:
    """Return the ids of a batch, {split: (N,) uint32}, and the number of its UTF-8 bytes.

    tokenizer: the tokenizer
    batch: the pieces to encode, in order
    """
    ids: dict[str, list[int]] = {}
    for piece in batch:
        side = ids.setdefault(piece.split, [])
        if piece.is_start and tokenizer.bos_id is not None:
            side.append(tokenizer.bos_id)
        side.extend(tokenizer.encode(piece.text))
    size = sum(len(piece.text.encode("utf-8")) for piece in batch)
    return {split: np.array(side, np.uint32) for split, side in ids.items()}, size


def _batches(parts: Iterable[tuple[str, str]], by_lines: bool) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for split, text in parts:
        for number, stretch in enumerate(_stretches(text) if by_lines else [text]):
            batch.append(Piece(split, number == 0, stretch))
            size += len(stretch)
            if size >= PIECE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _stretches(text: str) -> Iterator[str]:
    """Split after a newline, or within a line at a multiple of LINE_LIMIT from its start."""
    start = 0
    while len(text) - start > PIECE:
        end = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _encode_in_pool(
    batches: Iterator[list[Piece]], file: Path, workers: int
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    # Forked workers start at once; elsewhere fork is missing or unsafe.
    method = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    # Not Executor.map, which would read the whole corpus before the first result.
    running: deque[Future] = deque()
    try:
        for batch in batches:
            running.append(_submit(pool, file, batch))
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool:
        raise UnavailableError(
            f"a worker process died while encoding (out of memory?); try {parameter('workers')} 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, file: Path, batch: list[Piece]) -> Future:
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork in a process with threads; workers use none of their locks.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        return pool.submit(_encode_in_worker, file, batch)


def _start_worker() -> None:
    # The parent handles Ctrl-C, and a worker must not outlive a parent that was killed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(file: Path, batch: list[Piece]) -> tuple[dict[str, np.ndarray], int]:
    return encode_batch(load_tokenizer(file), batch)
