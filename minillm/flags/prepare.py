"""The command line of `minillm prepare`."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from minillm import documents
from minillm.cli import HelpFormatter, Parser, path, real, whole
from minillm.errors import UsageError
from minillm.storage import check_place


def parse(argv: Sequence[str]) -> Namespace:
    """Parse the flags of `minillm prepare`; raise UsageError on paths that are not there."""
    args = parser().parse(argv)
    if args.tokenizer == "":
        raise UsageError("--tokenizer is empty; expected bpe, char, byte or a tokenizer's file")
    if args.out is None:
        check_place("--cache-dir", args.cache_dir)
    else:
        check_place("--out", args.out.parent)
    for place in args.paths:
        if not Path(place).exists():
            documents.find([place])
    return args


def parser() -> Parser:
    """Return the parser of the command's flags."""
    p = Parser(
        prog="minillm prepare",
        description="Split text, tokenize it and write token shards that train.py --data reads.",
        formatter_class=HelpFormatter,
    )
    add = p.add_argument
    add(
        "paths",
        nargs="*",
        metavar="PATH",
        help="a text file, .jsonl, .jsonl.gz or .parquet file with a text column, a folder of them "
        "or a glob pattern; without any, the standard library of this Python",
    )
    add("--out", type=path, help="new folder to write (without it: a place below --cache-dir)")
    add("--cache-dir", type=path, default=Path("data/prepared"), help="where corpora are kept")
    add("--tokenizer", help="bpe, char, byte, FILE.model or FILE.json (default: bpe)")
    add(
        "--vocab-size",
        type=whole(1, 1_000_000),
        help="tokens of a bpe vocabulary (without it: chosen from the amount of text)",
    )
    add(
        "--val-fraction",
        type=real(0, 0.5),
        help="share of the bytes held out for validation, 0 to 0.5 (default: 0.05)",
    )
    add(
        "--errors",
        choices=("strict", "replace"),
        help="bytes that are not UTF-8: refuse, or put U+FFFD in their place (default: strict)",
    )
    add(
        "--workers",
        type=whole(1, 1024),
        help="processes that encode (without it: one a core, from 4 MB of text on)",
    )
    return p
