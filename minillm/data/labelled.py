"""Write sequences that have their own targets as a prepared corpus for train.py.

They are for tasks whose answer is not the next token. data/tasks.py generates such sequences.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minillm.data import shards
from minillm.data.shards import Corpus, ShardWriter, open_corpus
from minillm.data.tokenizer import CharTokenizer
from minillm.errors import UsageError, parameter
from minillm.runtime.files import building, json_digest

SHARD_TOKENS = 100_000_000


def write_sequences(
    folder: Path,
    alphabet: str,
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    source: str,
    settings: dict[str, Any],
) -> Corpus:
    """Write a corpus of sequences in which each token is a character; return it, opened.

    folder: folder to write
    alphabet: the characters, sorted by code point; token i is the i-th
    splits: tokens and targets of "train" and "val", (sequences, T) integers each; a target is a
        token, or -100 where there is no target
    source: description of the corpus, for index.json
    settings: settings that the sequences were made with, for index.json
    Raises UsageError if `folder` exists and is not empty.
    """
    if list(alphabet) != sorted(set(alphabet)):
        raise ValueError("alphabet: expected different characters, sorted")
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(
            f"{parameter('out')} {folder}: exists and is not empty; choose another place"
        )
    tokenizer, entries = CharTokenizer(alphabet), []
    counts = {split: len(tokens) for split, (tokens, _) in splits.items()}
    sizes = {split: tokens.size for split, (tokens, _) in splits.items()}
    with building(folder) as temporary:
        tokenizer.save(temporary)
        for split, (tokens, targets) in splits.items():
            if tokens.shape != targets.shape:
                raise ValueError(f"{split}: {tokens.shape} tokens, {targets.shape} targets")
            for part, kind in ((tokens, False), (targets, True)):
                writer = ShardWriter(temporary, split, len(alphabet), SHARD_TOKENS, targets=kind)
                writer.add(part.reshape(-1))
                entries += writer.close()
        shards.write_index(temporary, {
            "source": source,
            "key": json_digest({**settings, "entries": entries}),
            "settings": settings,
            "tokenizer": tokenizer.file_name,
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": len(alphabet),
            "dtype": shards.dtype_for(len(alphabet)),
            "bytes_per_split": sizes,
            "documents": counts,
            "sequence": splits["train"][0].shape[1],
            "shards": entries,
        })  # fmt: skip
    return open_corpus(folder)
