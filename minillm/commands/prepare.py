"""`python -m minillm prepare`: text to a tokenizer and token shards."""

import sys
from collections.abc import Sequence
from pathlib import Path

from minillm.cli import HelpFormatter, Parser, path, real, whole
from minillm.corpus import prepare
from minillm.errors import UsageError
from minillm.shards import is_prepared
from minillm.storage import check_place


def main(argv: Sequence[str]) -> None:
    """Prepare what the command line names; all that is said goes to standard error."""
    args = _parser().parse(argv)
    late = [n for n in ("tokenizer", "val_fraction", "errors") if getattr(args, n) is not None]
    for folder in filter(is_prepared, args.paths):
        if late or len(args.paths) > 1:
            raise UsageError(f"{folder} is prepared already; give the text it was made from")
    if args.tokenizer == "":
        raise UsageError("--tokenizer is empty; expected bpe, char, byte or a tokenizer's file")
    if args.out is None:
        check_place("--cache-dir", args.cache_dir)
    else:
        check_place("--out", args.out.parent)
    prepare(
        args.paths or None,
        tokenizer=args.tokenizer or "bpe",
        vocab_size=args.vocab_size,
        val_fraction=0.05 if args.val_fraction is None else args.val_fraction,
        out=args.out,
        cache_dir=args.cache_dir,
        errors=args.errors or "strict",
        workers=args.workers,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )


def _parser() -> Parser:
    parser = Parser(
        prog="minillm prepare",
        description="Split text, tokenize it and write token shards that train.py --data reads.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
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
    return parser
