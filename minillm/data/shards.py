"""A prepared corpus on disk: token shards, the tokenizer and index.json with a digest of each.

    train-00000.bin ... val-00000.bin ...   token ids, little-endian uint16 or uint32
    train-targets-00000.bin ...             for tasks whose answer is not the next token: a target
                                            for each token, little-endian int32, -100 for no target
    tokenizer.model or tokenizer.json
    index.json                              size and digests of each file, and its own sha256

prepare.py makes the tokens, and batches.py reads them.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm.data.tokenizer import Tokenizer, load_tokenizer
from minillm.errors import CorruptError, UsageError
from minillm.runtime.files import bytes_digest, file_digest, read_json, write_json
from minillm.runtime.ownership import CORPUS, claims

INDEX = "index.json"
REPAIR = "delete the folder and prepare the corpus again"
# Bytes per digest. A reader must read a whole block before it can trust its first token.
BLOCK = 1 << 20
SPLITS = ("train", "val")
TARGETS = np.dtype("<i4")
NAME = r"(train|val)(-targets)?-\d{5,}\.bin"


@dataclass(frozen=True)
class Shard:
    """One file of tokens.

    path: the file
    bytes: its size
    tokens: number of tokens in it
    max_id: largest token id in it
    sha256: digest of each block of BLOCK bytes, in hex
    """

    path: Path
    bytes: int
    tokens: int
    max_id: int
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus whose index has been checked.

    dtype: "uint16" or "uint32"
    tokens, documents: number of each, by split
    bytes: UTF-8 bytes of the text, by split
    shards: token shards by split
    source: description of the text
    key: digest of the text and of the settings that the tokens depend on
    settings: these settings (tokenizer, vocab_size, val_fraction, ...)
    sequence: tokens of each sequence if the corpus has its own targets, else None
    targets: shards of the targets, by split
    held_out: names of the first held-out documents; older corpora do not have them
    """

    folder: Path
    vocab_size: int
    dtype: str
    tokens: dict[str, int]
    bytes: dict[str, int]
    documents: dict[str, int]
    shards: dict[str, tuple[Shard, ...]]
    tokenizer_file: Path
    source: str
    key: str
    settings: dict[str, Any]
    sequence: int | None
    targets: dict[str, tuple[Shard, ...]]
    held_out: tuple[str, ...] = ()

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that made these tokens."""
        return load_tokenizer(self.tokenizer_file)


class ShardWriter:
    """Writer of the tokens, or the targets, of one split to numbered files.

    folder: folder of the files
    split: "train" or "val"
    vocab_size: ids must be below it
    shard_tokens: number of tokens in each file but the last
    targets: True to write targets in place of tokens
    """

    def __init__(
        self, folder: Path, split: str, vocab_size: int, shard_tokens: int, targets: bool = False
    ) -> None:
        self.shards: list[dict[str, Any]] = []
        self._folder, self._stem = folder, f"{split}-targets" if targets else split
        self._vocab_size, self._shard_tokens = vocab_size, shard_tokens
        self._dtype = TARGETS if targets else np.dtype(dtype_for(vocab_size)).newbyteorder("<")
        self._start()

    def add(self, ids: np.ndarray) -> None:
        """Append ids, (N,) of any integer type; raise ValueError if one is not below vocab_size."""
        # A cast to uint16 would wrap a larger id without an error.
        if len(ids) and int(ids.max()) >= self._vocab_size:
            raise ValueError(f"id {int(ids.max())} in a vocabulary of {self._vocab_size}")
        ids = ids.astype(self._dtype)
        while len(ids):
            part, ids = np.split(ids, [self._shard_tokens - self._tokens])
            self._tokens += len(part)
            self._max_id = max(self._max_id, int(part.max()))
            self._waiting += part.tobytes()
            while len(self._waiting) >= BLOCK:
                self._write_block()
            if self._tokens == self._shard_tokens:
                self._finish()

    def close(self) -> list[dict[str, Any]]:
        """Write the remaining tokens, and return the index entries of all shards."""
        if self._tokens:
            self._finish()
        return self.shards

    def _start(self) -> None:
        self._path = self._folder / f"{self._stem}-{len(self.shards):05d}.bin"
        self._tokens = self._max_id = 0
        self._waiting = bytearray()
        self._digests: list[str] = []

    def _write_block(self) -> None:
        block = bytes(self._waiting[:BLOCK])
        del self._waiting[:BLOCK]
        self._digests.append(bytes_digest(block))
        with self._path.open("ab") as file:
            file.write(block)

    def _finish(self) -> None:
        if self._waiting:
            self._write_block()
        with self._path.open("ab") as file:
            os.fsync(file.fileno())
        self.shards.append(
            {
                "name": self._path.name,
                "bytes": self._tokens * self._dtype.itemsize,
                "tokens": self._tokens,
                "max_id": self._max_id,
                "sha256": self._digests,
            }
        )
        self._start()


def dtype_for(vocab_size: int) -> str:
    """Return "uint16" if it can hold every id, else "uint32"."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_index(folder: Path, content: dict[str, Any]) -> None:
    """Write index.json.

    folder: folder of the corpus
    content: the index, without version and digest
    """
    write_json(folder / INDEX, content)


def is_prepared(path: str | Path) -> bool:
    """Return whether `path` is the folder of a prepared corpus, intact or damaged."""
    return claims(Path(path), CORPUS)


def open_corpus(folder: str | Path) -> Corpus:
    """Open a prepared corpus and check everything except the tokens, which are checked when read.

    It checks the index against its digest, the version, the presence and size of every file, the
    largest ids against the vocabulary, and the tokenizer against its digest. It reads only the
    index and the tokenizer. Raises UsageError if there is no such corpus, and CorruptError, which
    names the file, if it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; prepare a corpus first")
    if not is_prepared(folder):
        raise UsageError(f"{folder}: not a prepared corpus: it has no {INDEX} of one")
    content = read_json(folder / INDEX, REPAIR)
    try:
        corpus = _from_index(folder, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _corrupt(
            folder / INDEX, f"not in the form that this version writes ({error!r})"
        ) from None
    _check_shards(corpus)
    _check_tokenizer(corpus, str(content["tokenizer_sha256"]))
    return corpus


def _from_index(folder: Path, content: dict[str, Any]) -> Corpus:
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    targets: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    for entry in content["shards"]:
        # A name in the index must not lead out of the folder.
        name = re.fullmatch(NAME, entry["name"])
        if not name:
            raise ValueError(f"a shard named {entry['name']!r}")
        sizes = [_count(entry[key]) for key in ("bytes", "tokens", "max_id")]
        kind = targets if name[2] else shards
        kind[name[1]].append(Shard(folder / name[0], *sizes, tuple(entry["sha256"])))
    sequence = content.get("sequence")
    if sequence is not None and _count(sequence) == 0:
        raise ValueError(f"sequences of {sequence}")
    vocab_size = _count(content["vocab_size"])
    for split in SPLITS:
        held, answered = (sum(s.tokens for s in kind[split]) for kind in (shards, targets))
        if (sequence is None and answered) or (sequence and (answered != held or held % sequence)):
            raise ValueError(f"{answered} targets for {held} tokens in sequences of {sequence}")
    if content["tokenizer"] not in ("tokenizer.model", "tokenizer.json"):
        raise ValueError(f"a tokenizer named {content['tokenizer']!r}")
    if content["dtype"] != dtype_for(vocab_size):
        raise ValueError(f"dtype {content['dtype']!r}")
    return Corpus(
        folder=folder,
        vocab_size=vocab_size,
        dtype=content["dtype"],
        tokens={split: sum(shard.tokens for shard in shards[split]) for split in SPLITS},
        bytes={split: _count(content["bytes_per_split"][split]) for split in SPLITS},
        documents={split: _count(content["documents"][split]) for split in SPLITS},
        shards={split: tuple(shards[split]) for split in SPLITS},
        tokenizer_file=folder / content["tokenizer"],
        source=str(content["source"]),
        key=str(content["key"]),
        settings=dict(content.get("settings", {})),
        sequence=sequence,
        targets={split: tuple(targets[split]) for split in SPLITS},
        held_out=tuple(str(name) for name in content.get("held_out", ())),
    )


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} where a count was expected")
    return value


def _check_shards(corpus: Corpus) -> None:
    known = set()
    narrow = np.dtype(corpus.dtype).itemsize
    kinds = ((corpus.shards, narrow), (corpus.targets, TARGETS.itemsize))
    every = ((shard, size) for kind, size in kinds for split in SPLITS for shard in kind[split])
    for shard, itemsize in every:
        known.add(shard.path.name)
        if not shard.path.is_file():
            raise _corrupt(shard.path, "is missing")
        size = shard.path.stat().st_size
        if size != shard.bytes:
            raise _corrupt(shard.path, f"has {size} bytes, the index says {shard.bytes}")
        blocks = -(-shard.bytes // BLOCK)
        if shard.bytes != shard.tokens * itemsize or len(shard.sha256) != blocks:
            raise _corrupt(shard.path, "the index contradicts itself about its size")
        if shard.max_id >= corpus.vocab_size:
            largest = f"has id {shard.max_id}, the vocabulary ends at {corpus.vocab_size - 1}"
            raise _corrupt(shard.path, largest)
    for path in sorted(corpus.folder.iterdir()):
        if re.fullmatch(NAME, path.name) and path.name not in known:
            raise _corrupt(path, "is not in the index")


def _check_tokenizer(corpus: Corpus, expected: str) -> None:
    path = corpus.tokenizer_file
    if not path.is_file():
        raise _corrupt(path, "is missing")
    if file_digest(path) != expected:
        raise _corrupt(path, "is not the tokenizer that made these tokens (its sha256 differs)")
    if corpus.tokenizer().vocab_size != corpus.vocab_size:
        raise _corrupt(path, f"does not have the {corpus.vocab_size} tokens of the index")


def _corrupt(path: Path, what: str) -> CorruptError:
    return CorruptError(f"{path}: {what}; {REPAIR}")
