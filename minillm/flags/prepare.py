"""Flags of `minillm prepare`, and the refusals that need no torch."""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from minillm.config.train import TrainConfig
from minillm.data import documents
from minillm.errors import UsageError
from minillm.runtime.cli import Parser, path, path_text, real, whole
from minillm.runtime.files import check_place
from minillm.runtime.launch import shell_command
from minillm.runtime.relative_paths import CACHE
from minillm.runtime.terminal import decoded


def parse(argv: Sequence[str]) -> Namespace:
    """Parse the flags of `minillm prepare`; raise UsageError if a path does not exist."""
    args = parser().parse(argv)
    if args.tokenizer == "":
        raise UsageError("--tokenizer is empty; expected bpe, char, byte or a tokenizer's file")
    if args.out is None:
        check_place("cache_dir", args.cache_dir)
    else:
        check_place("out", args.out.parent)
    for place in (*args.paths, *(args.val or ())):
        if not Path(place).exists():
            documents.find([place])
    return args


def parser() -> Parser:
    """Return the parser of the flags of `minillm prepare`."""
    start = partial(shell_command, "prepare")
    p = Parser(
        prog=start(),
        description="Split text, tokenize it and write token shards that train.py --data reads.",
        examples=(
            (start("my.txt", "--out", "corpus"), "prepare one text in a new folder"),
            (start("texts", "--tokenizer", "char"), "one token per character of a folder of texts"),
            (start("rows.jsonl", "--val-fraction", 0.1), "hold a tenth out for validation"),
        ),
    )  # fmt: skip
    add = p.add_argument
    add("paths", nargs="*", metavar="PATH", type=path_text,
        help="text file, .docx, .epub, .html, .ipynb or .pdf document, .jsonl, .json or .parquet "
        "file of rows, folder or glob pattern (default: the standard library of this "
        "Python)")  # fmt: skip
    add("--out", type=path, metavar="DIR",
        help="new folder to write (default: a folder in --cache-dir)")  # fmt: skip
    add("--cache-dir", type=path, default=Path(CACHE), metavar="DIR",
        help="folder to keep prepared text in")  # fmt: skip
    add("--tokenizer", type=path_text, metavar="NAME",
        help="tokenizer: bpe, char, byte, or a file FILE.model or FILE.json "
        "(default: bpe)")  # fmt: skip
    add("--vocab-size", type=whole(1, 1_000_000), metavar="N",
        help="number of tokens in the vocabulary of bpe (default: chosen from the amount of "
        "text)")  # fmt: skip
    add("--val-fraction", type=real(0, 0.5), metavar="X",
        help="share of the bytes held out for validation, 0 to 0.5 "
        f"(default: {TrainConfig.val_fraction:g})")  # fmt: skip
    add("--val", nargs="+", metavar="PATH", type=path_text,
        help="text files, folders or glob patterns to validate on, instead of --val-fraction; text "
        "that is among the other paths too is left out of training")  # fmt: skip
    add("--text-column", type=decoded, metavar="NAME",
        help="column with the text of .jsonl, .json and .parquet files "
        "(default: text)")  # fmt: skip
    add("--encoding", metavar="NAME",
        help="encoding of the text, such as cp1252 or utf-16 (default: utf-8)")  # fmt: skip
    add("--errors", choices=("strict", "replace"),
        help="treatment of bytes that are invalid in the encoding: refuse the file, or replace "
        "them by U+FFFD (default: strict)")  # fmt: skip
    add("--workers", type=whole(1, 1024), metavar="N",
        help="number of processes that encode (default: one for each processor, for texts above "
        "4 MB)")  # fmt: skip
    return p
