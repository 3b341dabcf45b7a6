"""`python -m minillm prepare`: text to a tokenizer and token shards."""

import sys
from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from minillm.cli import Parser, real, whole
from minillm.corpus import prepare


def main(argv: Sequence[str]) -> None:
    """Prepare what the command line names; all that is said goes to standard error."""
    args = _parser().parse(argv)
    prepare(
        args.paths or None,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        val_fraction=args.val_fraction,
        out=args.out,
        cache_dir=args.cache_dir,
        errors=args.errors,
        workers=args.workers,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )


def _parser() -> Parser:
    parser = Parser(
        prog="minillm prepare",
        description="Split text, tokenize it and write token shards that train.py --data reads.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "paths",
        nargs="*",
        metavar="PATH",
        help="a text file, .jsonl, .jsonl.gz or .parquet file with a text column, a folder of them "
        "or a glob pattern; without any, the standard library of this Python",
    )
    add("--out", type=Path, help="new folder to write (without it: a place below --cache-dir)")
    add("--cache-dir", type=Path, default=Path("data/prepared"), help="where corpora are kept")
    add("--tokenizer", default="bpe", help="bpe, char, byte, or FILE.model or FILE.json to use")
    add(
        "--vocab-size",
        type=whole(1, 1_000_000),
        help="tokens of a bpe vocabulary (without it: chosen from the amount of text)",
    )
    add(
        "--val-fraction",
        type=real(0, 0.5),
        default=0.05,
        help="share of the bytes held out for validation, 0 to 0.5",
    )
    add(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="bytes that are not UTF-8: refuse, or put U+FFFD in their place",
    )
    add(
        "--workers",
        type=whole(1, 1024),
        help="processes that encode (without it: one a core, from 4 MB of text on)",
    )
    return parser
