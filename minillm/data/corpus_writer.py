"""Train a tokenizer on text and write the text as token shards, for prepare.py."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minillm.data import documents, encode, shards
from minillm.data.shards import open_corpus
from minillm.data.split import Split, held_out_names, parts
from minillm.data.survey import Text
from minillm.data.tokenizer import Tokenizer, UnknownCharacterError, train_tokenizer
from minillm.errors import UsageError, parameter
from minillm.runtime.files import building, write_durably

Say = Callable[[str], None]
NAMES = 3  # number of held-out documents whose names are shown
REPORT_S = 5  # seconds between two lines about the progress


def train_on(text: Text, plan: Split, kind: str, vocab_size: int | None, say: Say) -> Tokenizer:
    """Return a tokenizer trained on text.

    text: the text
    plan: split of the text; bpe is trained on the training side only
    kind: "bpe" or "char"
    vocab_size: number of tokens of bpe
    say: receives each line to show
    """
    if kind == "char":
        # Trained on the held-out text too, as nanoGPT does: all its characters must have ids.
        return train_tokenizer("char", [text.survey.characters])
    say(f"training a bpe tokenizer of {vocab_size} tokens")
    train_texts = (part.text for part in parts(text, plan) if part.side == "train")
    made = train_tokenizer(kind, train_texts, vocab_size)
    if made.vocab_size != vocab_size:
        say(f"the text supports {made.vocab_size} tokens, not {vocab_size}")
    return made


@contextmanager
def building_corpus(folder: Path, key: str) -> Iterator[Path]:
    """Build a folder as files.building does; another process may finish the same corpus first.

    folder: folder of the corpus
    key: digest of the corpus
    """
    try:
        with building(folder) as temporary:
            yield temporary
    except OSError:
        # The corpus of the other process is the same.
        if not shards.is_prepared(folder) or open_corpus(folder).key != key:
            raise


def write_corpus(
    text: Text,
    plan: Split,
    made: Tokenizer,
    folder: Path,
    workers: int,
    shard_tokens: int,
    say: Say,
) -> dict[str, Any]:
    """Write the tokenizer and the shards of a corpus; return their entries in the index.

    text: the text
    plan: split of the text
    made: the tokenizer
    folder: folder to write to
    workers: number of processes that encode
    shard_tokens: largest number of tokens in a shard
    say: receives each line to show
    """
    file = folder / made.file_name
    write_durably(file, made.to_bytes())
    n_bytes = sum(plan.bytes.values())
    writers = {
        side: shards.ShardWriter(folder, side, made.vocab_size, shard_tokens)
        for side in shards.SPLITS
    }
    said = time.monotonic()
    done = 0
    pieces = ((part.side, part.text) for part in parts(text, plan))
    try:
        for ids, size in encode.encode(pieces, made, file, workers):
            for side, side_ids in ids.items():
                writers[side].add(side_ids)
            done += size
            if time.monotonic() - said > REPORT_S:
                said = time.monotonic()
                say(f"encoded {done / n_bytes:.0%} of {n_bytes / 1e6:.0f} MB")
    except UnknownCharacterError:  # its position is within a piece of a document
        raise UsageError(_about_unknown(text, made)) from None
    return {
        "source": text.source.description,
        "tokenizer": made.file_name,
        "tokenizer_sha256": made.sha256,
        "vocab_size": made.vocab_size,
        "dtype": shards.dtype_for(made.vocab_size),
        "bytes_per_split": plan.bytes,
        "documents": plan.documents,
        "held_out": held_out_names(text, plan, NAMES),
        "shards": [entry for side in shards.SPLITS for entry in writers[side].close()],
    }


def _about_unknown(text: Text, made: Tokenizer) -> str:
    """Return a message on the first character that the tokenizer lacks, with its position."""
    found = ((document, made.unknown(document.text)) for document in text.documents())
    document, at = next((document, at) for document, at in found if at is not None)
    before, c = document.text[:at], document.text[at]
    line, column = before.count("\n") + 1, at - before.rfind("\n")
    byte = "" if document.start is None else f", offset {document.start + len(before.encode())}"
    return (
        f"{documents.shown(document.name)}: line {line}, column {column}{byte}: character {c!a} "
        f"(U+{ord(c):04X}) is not among the {made.vocab_size} characters of the tokenizer; take it "
        f"out of the text, or use {parameter('tokenizer')} byte"
    )
