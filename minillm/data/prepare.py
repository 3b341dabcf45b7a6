"""Text to a prepared corpus: find it prepared already, or split, tokenize and write it.

The text is read to know its content, which names the cache and decides the split; for bpe once more
to train the tokenizer; and once to encode it. The tokens depend on the text and the settings alone,
never on paths, workers or the machine. What this room does not do: find files (documents.py), hold
text out (split.py), know the format on disk (shards.py).
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minillm.data import documents, encode as encoding, shards
from minillm.data.bpe import check_vocab_size, choose_vocab_size
from minillm.data.held_out import about
from minillm.data.shards import Corpus, open_corpus
from minillm.data.split import NEITHER, Split, held_out_names, parts, split
from minillm.data.survey import Text, survey
from minillm.data.tokenizer import (
    KINDS,
    Tokenizer,
    UnknownCharacterError,
    load_tokenizer,
    train_tokenizer,
)
from minillm.errors import CorruptError, UsageError
from minillm.runtime.files import VERSION, building, json_digest, write_durably

Say = Callable[[str], None]
SHARD_TOKENS = 100_000_000
NAMES = 3  # of held-out documents that are shown


def prepare(
    paths: Sequence[str] | None,
    *,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    val_fraction: float = 0.05,
    val: Sequence[str] | None = None,
    out: Path | None = None,
    cache_dir: Path = Path("data/prepared"),
    errors: str = "strict",
    encoding: str = "utf-8",
    text_column: str = "text",
    whole_documents: bool = False,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    say: Say = print,
) -> Corpus:
    """Prepare the text at `paths` (None: the default corpus), or open it if that was done before.

    A single path that is a prepared folder is opened as it is.

    tokenizer: bpe, char, byte or a tokenizer's file.
    vocab_size: for bpe; None chooses it from the amount of text.
    val_fraction: 0 (nothing is held out) to 0.5 of the bytes.
    val: where the validation text is. Then val_fraction is not used.
    out: the folder to write; None is cache_dir/<hash of text and settings>.
    errors: "strict" or "replace", for bytes that are not of the encoding.
    encoding: of the text.
    text_column: where rows of .jsonl, .json and .parquet files have their text.
    whole_documents: hold out no tails of documents, see split.
    workers: processes that encode; None takes the cores, from 4 MB on.
    say: gets each line to show.
    """
    started = time.monotonic()
    _refuse_prepared(paths or (), val or ())
    if paths and shards.is_prepared(paths[0]):
        return _already_prepared(Path(paths[0]), out, vocab_size, say)
    made = _given_tokenizer(tokenizer, vocab_size)
    text = survey(
        documents.find(paths, encoding, text_column), errors, tokenizer == "char",
        documents.find(val, encoding, text_column) if val else None,
    )  # fmt: skip
    if line := documents.about_skipped(text.survey.skipped):
        say(line)
    plan = split(text, val_fraction, whole_documents)
    if n := int((plan.side == NEITHER).sum()):
        verb = "is validation text too and is" if n == 1 else "are validation text too and are"
        say(f"text      {n} of the documents to train on {verb} left out")
    if tokenizer == "bpe" and vocab_size is None:
        vocab_size = choose_vocab_size(plan.bytes["train"])
    settings = {
        "tokenizer": tokenizer if made is None else made.sha256,
        "vocab_size": vocab_size if tokenizer == "bpe" else None,
        "val_fraction": None if val else val_fraction,
        "shard_tokens": shard_tokens,
    }
    if tokenizer == "bpe" and text.survey.has_reserved:  # lines with it did not count once
        settings["reserved"] = True
    if plan.rule != "documents":  # which was the only rule once, and has no name in a key
        settings["split"] = plan.rule + text.survey.given_digest
    key = _key(text, settings)
    folder = Path(cache_dir, key[:16]) if out is None else Path(out)
    if os.path.lexists(folder) and not _is_empty_folder(folder):
        # The same text may have had other names when it was prepared.
        names = held_out_names(text, plan, NAMES)
        return _found(folder, key, out is None, names, say)
    say(f"corpus    preparing {documents.shown(text.source.description)} in {folder}")
    if made is None:
        made = _train(text, plan, tokenizer, vocab_size, say)
    if made.note:
        say(f"warning   {made.note}")
    with _building(folder, key) as temporary:
        index = _write(text, plan, made, temporary, workers, shard_tokens, say)
        shards.write_index(temporary, {**index, "key": key, "settings": settings})
    corpus = open_corpus(folder)
    say(about(corpus, time.monotonic() - started))
    return corpus


def _refuse_prepared(paths: Sequence[str], val: Sequence[str]) -> None:
    """Raise UsageError where a prepared folder stands among other text, or is validation text."""
    for folder in filter(shards.is_prepared, paths):
        if len(paths) > 1:
            raise UsageError(
                f"{documents.shown(folder)} is prepared already and cannot be joined with other "
                "text; give it alone, or give the text that it was made from"
            )
        if val:
            raise UsageError(
                f"--val {documents.shown(val[0])}: {documents.shown(folder)} is prepared already "
                "and has its own validation text; leave --val out"
            )
    for folder in filter(shards.is_prepared, val):
        raise UsageError(
            f"--val {documents.shown(folder)} is prepared already; "
            "give the text that it was made from"
        )


def _already_prepared(folder: Path, out: Path | None, vocab_size: int | None, say: Say) -> Corpus:
    if out is not None:
        raise UsageError(f"{folder}: already a prepared corpus; leave --out away, or name its text")
    corpus = open_corpus(folder)
    asked = corpus.settings.get("vocab_size")  # the text may not have supported so large a one
    if vocab_size not in (None, asked, corpus.vocab_size):
        raise UsageError(
            f"--vocab-size {vocab_size}: {folder} was prepared with {corpus.vocab_size} tokens"
        )
    say(about(corpus))
    return corpus


def _given_tokenizer(tokenizer: str, vocab_size: int | None) -> Tokenizer | None:
    """The tokenizer that needs no training on the text, if it is one."""
    if tokenizer == "byte":
        made = train_tokenizer("byte", [])
    elif tokenizer in KINDS:
        if tokenizer == "char" and vocab_size is not None:
            raise UsageError("--vocab-size is for bpe: char has the text's own characters")
        if tokenizer == "bpe" and vocab_size is not None:
            check_vocab_size(vocab_size)
        return None
    elif os.path.lexists(tokenizer):
        made = load_tokenizer(tokenizer, foreign=True)
    else:
        raise UsageError(
            f"--tokenizer {documents.shown(tokenizer)}: no such file; expected bpe, char, byte or "
            "a tokenizer's file"
        )
    if vocab_size not in (None, made.vocab_size):
        raise UsageError(
            f"--vocab-size {vocab_size}: this tokenizer has {made.vocab_size} tokens; "
            "leave --vocab-size out"
        )
    return made


def _key(text: Text, settings: dict[str, Any]) -> str:
    """Name a prepared corpus by all that its tokens depend on."""
    names = {
        "text": text.survey.digest,
        "format": VERSION,
        # Another release may train another tokenizer on the same text.
        "sentencepiece": version("sentencepiece"),
        **settings,
    }
    return json_digest(names)


def _is_empty_folder(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def _found(folder: Path, key: str, is_cache: bool, names: tuple[str, ...], say: Say) -> Corpus:
    if shards.is_prepared(folder):
        corpus = replace(open_corpus(folder), held_out=names)
        if corpus.key == key:
            say(about(corpus))
            return corpus
        if is_cache:
            raise CorruptError(f"{folder}: not the corpus its name says; delete the folder")
    if is_cache:
        raise UsageError(
            f"{folder}: exists and is not a prepared corpus; move it away, or choose another "
            "--cache-dir"
        )
    raise UsageError(
        f"{documents.shown(folder)}: exists and is not this corpus prepared with these settings; "
        "choose another --out"
    )


def _train(text: Text, plan: Split, kind: str, vocab_size: int | None, say: Say) -> Tokenizer:
    if kind == "char":
        # All of the text, as nanoGPT does: a character of the held-out part must have an id.
        return train_tokenizer("char", [text.survey.characters])
    say(f"training a bpe tokenizer of {vocab_size} tokens")
    train_texts = (part.text for part in parts(text, plan) if part.side == "train")
    made = train_tokenizer(kind, train_texts, vocab_size)
    if made.vocab_size != vocab_size:
        say(f"the text supports {made.vocab_size} tokens, not {vocab_size}")
    return made


@contextmanager
def _building(folder: Path, key: str) -> Iterator[Path]:
    """storage.building of a corpus, which another process may have built meanwhile."""
    try:
        with building(folder) as temporary:
            yield temporary
    except OSError:
        # Its work is as good as ours.
        if not shards.is_prepared(folder) or open_corpus(folder).key != key:
            raise


def _write(
    text: Text,
    plan: Split,
    made: Tokenizer,
    folder: Path,
    workers: int | None,
    shard_tokens: int,
    say: Say,
) -> dict[str, Any]:
    """Write the tokenizer and the shards into `folder`; return what the index says of them."""
    file = folder / made.file_name
    write_durably(file, made.to_bytes())
    n_bytes = sum(plan.bytes.values())
    workers = workers or encoding.choose_workers(n_bytes)
    writers = {
        side: shards.ShardWriter(folder, side, made.vocab_size, shard_tokens)
        for side in shards.SPLITS
    }
    said = time.monotonic()
    done = 0
    pieces = ((part.side, part.text) for part in parts(text, plan))
    try:
        for ids, size in encoding.encode(pieces, made, file, workers):
            for side, side_ids in ids.items():
                writers[side].add(side_ids)
            done += size
            if time.monotonic() - said > 5:
                said = time.monotonic()
                say(f"encoded {done / n_bytes:.0%} of {n_bytes / 1e6:.0f} MB")
    except UnknownCharacterError:  # which knows its place in a piece of a document only
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
    """Name the first character of the text that the tokenizer lacks, and where it stands."""
    found = ((document, made.unknown(document.text)) for document in text.documents())
    document, at = next((document, at) for document, at in found if at is not None)
    before, c = document.text[:at], document.text[at]
    line, column = before.count("\n") + 1, at - before.rfind("\n")
    byte = "" if document.start is None else f", offset {document.start + len(before.encode())}"
    return (
        f"{documents.shown(document.name)}: line {line}, column {column}{byte}: character {c!a} "
        f"(U+{ord(c):04X}) is not among the {made.vocab_size} characters of the tokenizer; take it "
        "out of the text, or use --tokenizer byte"
    )
