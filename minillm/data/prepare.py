"""Prepare text: find the corpus that was made from it before, or split, tokenize and write it.

The text is read to know its content, which names the cache and decides the split. For bpe it is
read again to train the tokenizer, and last it is read to encode it. The tokens depend on the text
and the settings alone, never on paths, workers or the machine. documents.py finds the files,
split.py holds text out, corpus_writer.py encodes, and shards.py knows the format on disk.
"""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minillm.data import documents, shards
from minillm.data.bpe import check_vocab_size, choose_vocab_size
from minillm.data.corpus_writer import NAMES, Say, building_corpus, train_on, write_corpus
from minillm.data.encode import choose_workers
from minillm.data.held_out import about
from minillm.data.shards import Corpus, open_corpus
from minillm.data.skipped import about_skipped, about_tables
from minillm.data.split import NEITHER, Split, held_out_names, split
from minillm.data.survey import Text, survey
from minillm.data.tokenizer import (
    KINDS,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from minillm.errors import CorruptError, UsageError, parameter
from minillm.runtime.files import VERSION, json_digest
from minillm.runtime.relative_paths import CACHE

SHARD_TOKENS = 100_000_000


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Settings of the preparation of text, on which the tokens depend, except for `workers`.

    val_fraction: share of the bytes to hold out, 0 (nothing) to 0.5; not used if `val` is given
    tokenizer: bpe, char, byte or a tokenizer's file
    vocab_size: number of tokens of bpe; None chooses it from the amount of text
    val: paths of the validation text
    errors: "strict" or "replace", for bytes that are invalid in the encoding
    encoding: encoding of the text
    text_column: column with the text of .jsonl, .json and .parquet files
    whole_documents: never hold out the ends of documents, see `split`
    workers: number of processes that encode; None uses all cores for texts above 4 MB
    shard_tokens: largest number of tokens in a shard
    """

    val_fraction: float
    tokenizer: str = "bpe"
    vocab_size: int | None = None
    val: Sequence[str] | None = None
    errors: str = "strict"
    encoding: str = "utf-8"
    text_column: str = "text"
    whole_documents: bool = False
    workers: int | None = None
    shard_tokens: int = SHARD_TOKENS


def prepare(
    paths: Sequence[str] | None,
    how: Preparation,
    *,
    out: Path | None = None,
    cache_dir: Path = Path(CACHE),
    say: Say = print,
) -> Corpus:
    """Prepare text, or open the corpus if that was done before.

    paths: files, folders and patterns; None for the default corpus. A single path that is a
        prepared folder is opened as it is.
    how: settings of the preparation
    out: folder to write; None for cache_dir/<hash of text and settings>
    cache_dir: folder of prepared corpora
    say: receives each line to show
    """
    started = time.monotonic()
    _refuse_prepared(paths or (), how.val or ())
    if paths and shards.is_prepared(paths[0]):
        return _already_prepared(Path(paths[0]), out, how.vocab_size, say)
    tokenizer = _given_tokenizer(how.tokenizer, how.vocab_size)
    text = _read(paths, how, say)
    plan = _hold_out(text, how, say)
    if how.tokenizer == "bpe" and how.vocab_size is None:
        how = replace(how, vocab_size=choose_vocab_size(plan.bytes["train"]))
    settings = _settings_of(text, plan, how, tokenizer)
    key = _key(text, settings)
    folder = Path(cache_dir, key[:16]) if out is None else Path(out)
    if os.path.lexists(folder) and not _is_empty_folder(folder):
        # The same text may have had other names when it was prepared.
        names = held_out_names(text, plan, NAMES)
        return _found(folder, key, out is None, names, say)
    say(f"corpus    preparing {documents.shown(text.source.description)} in {folder}")
    if tokenizer is None:
        tokenizer = train_on(text, plan, how.tokenizer, how.vocab_size, say)
    if tokenizer.note:
        say(f"warning   {tokenizer.note}")
    with building_corpus(folder, key) as temporary:
        workers = how.workers or choose_workers(sum(plan.bytes.values()))
        index = write_corpus(text, plan, tokenizer, temporary, workers, how.shard_tokens, say)
        shards.write_index(temporary, {**index, "key": key, "settings": settings})
    corpus = open_corpus(folder)
    say(about(corpus, time.monotonic() - started))
    return corpus


def refuse_settings(folder: str | Path, given: Iterable[str]) -> None:
    """Raise UsageError if the preparation of a prepared corpus is to be changed.

    folder: the prepared corpus
    given: names of settings that the user gave and that say how text is prepared
    """
    for name in sorted(given):
        raise UsageError(
            f"{parameter(name)}: {documents.shown(folder)} is prepared already; leave "
            f"{parameter(name)} out, or give the text that the folder was made from"
        )


def _refuse_prepared(paths: Sequence[str], val: Sequence[str]) -> None:
    """Raise UsageError if a prepared folder is given with other text, or as validation text."""
    for folder in filter(shards.is_prepared, paths):
        if len(paths) > 1:
            raise UsageError(
                f"{documents.shown(folder)} is prepared already and cannot be joined with other "
                "text; give it alone, or give the text that it was made from"
            )
        if val:
            raise UsageError(
                f"{parameter('val')} {documents.shown(val[0])}: {documents.shown(folder)} is "
                f"prepared already and has its own validation text; leave {parameter('val')} out"
            )
    for folder in filter(shards.is_prepared, val):
        raise UsageError(
            f"{parameter('val')} {documents.shown(folder)} is prepared already; "
            "give the text that it was made from"
        )


def _already_prepared(folder: Path, out: Path | None, vocab_size: int | None, say: Say) -> Corpus:
    if out is not None:
        raise UsageError(
            f"{folder}: already a prepared corpus; leave {parameter('out')} out, or name its text"
        )
    corpus = open_corpus(folder)
    requested = corpus.settings.get("vocab_size")  # which the text may not have supported
    if vocab_size not in (None, requested, corpus.vocab_size):
        raise UsageError(
            f"{parameter('vocab_size')} {vocab_size}: {folder} was prepared with "
            f"{corpus.vocab_size} tokens"
        )
    say(about(corpus))
    return corpus


def _read(paths: Sequence[str] | None, how: Preparation, say: Say) -> Text:
    """Read all text once, to know its content, and report skipped files and tables."""
    text = survey(
        documents.find(paths, how.encoding, how.text_column),
        how.errors,
        how.tokenizer == "char",
        documents.find(how.val, how.encoding, how.text_column) if how.val else None,
    )
    if line := about_skipped(text.survey.skipped):
        say(line)
    sources = [text.source, *([text.validation] if text.validation else [])]
    if line := about_tables(path for source in sources for path in source.files):
        say(line)
    return text


def _hold_out(text: Text, how: Preparation, say: Say) -> Split:
    """Split the text, and report the documents that are left out."""
    plan = split(text, how.val_fraction, how.whole_documents)
    if n := int((plan.side == NEITHER).sum()):
        verb = "is validation text too and is" if n == 1 else "are validation text too and are"
        say(f"text      {n} of the documents to train on {verb} left out")
    return plan


def _settings_of(
    text: Text, plan: Split, how: Preparation, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return the settings that the tokens depend on, as index.json has them.

    tokenizer: the tokenizer, if it is not trained on the text
    """
    settings = {
        "tokenizer": how.tokenizer if tokenizer is None else tokenizer.sha256,
        "vocab_size": how.vocab_size if how.tokenizer == "bpe" else None,
        "val_fraction": None if how.val else how.val_fraction,
        "shard_tokens": how.shard_tokens,
    }
    if how.tokenizer == "bpe" and text.survey.has_reserved:  # older releases dropped such lines
        settings["reserved"] = True
    if plan.rule != "documents":  # the only rule of older releases, which do not name it
        settings["split"] = plan.rule + text.survey.given_digest
    return settings


def _given_tokenizer(name: str, vocab_size: int | None) -> Tokenizer | None:
    """Return the tokenizer if it needs no training on the text, else None.

    name: bpe, char, byte or a tokenizer's file
    vocab_size: the number of tokens that the user asks for, or None
    """
    size = parameter("vocab_size")
    if name == "byte":
        made = train_tokenizer("byte", [])
    elif name in KINDS:
        if name == "char" and vocab_size is not None:
            raise UsageError(
                f"{size} is for bpe: char has one token for each character of the text"
            )
        if name == "bpe" and vocab_size is not None:
            check_vocab_size(vocab_size)
        return None
    elif os.path.lexists(name):
        made = load_tokenizer(name, foreign=True)
    else:
        raise UsageError(
            f"{parameter('tokenizer')} {documents.shown(name)}: no such file; expected bpe, char, "
            "byte or a tokenizer's file"
        )
    if vocab_size not in (None, made.vocab_size):
        raise UsageError(
            f"{size} {vocab_size}: this tokenizer has {made.vocab_size} tokens; leave {size} out"
        )
    return made


def _key(text: Text, settings: dict[str, Any]) -> str:
    """Return the digest of everything that the tokens depend on, which names a corpus."""
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
    """Open the corpus that is in `folder` already.

    key: digest that the corpus must have
    is_cache: True if the folder is in --cache-dir, False if --out names it
    names: names of held-out documents to report
    say: receives each line to show
    """
    if shards.is_prepared(folder):
        corpus = replace(open_corpus(folder), held_out=names)
        if corpus.key == key:
            say(about(corpus))
            return corpus
        if is_cache:
            raise CorruptError(f"{folder}: holds another corpus than its name says; delete it")
    if is_cache:
        raise UsageError(
            f"{folder}: exists and is not a prepared corpus; move it away, or choose another "
            f"{parameter('cache_dir')}"
        )
    raise UsageError(
        f"{documents.shown(folder)}: exists and is not this corpus prepared with these settings; "
        f"choose another {parameter('out')}"
    )
