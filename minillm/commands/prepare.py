"""`python -m minillm prepare`: text to a tokenizer and token shards."""

from collections.abc import Sequence

from minillm.data.prepare import prepare
from minillm.data.shards import is_prepared
from minillm.errors import UsageError
from minillm.flags import prepare as flags
from minillm.runtime import terminal


def main(argv: Sequence[str]) -> None:
    """Prepare what the command line names; all that is said goes to standard error."""
    args = flags.parse(argv)
    late = ("tokenizer", "val_fraction", "val", "errors", "encoding", "text_column")
    for folder in filter(is_prepared, args.paths):
        if len(args.paths) > 1 or any(getattr(args, name) is not None for name in late):
            raise UsageError(f"{folder} is prepared already; give the text it was made from")
    prepare(
        args.paths or None,
        tokenizer=args.tokenizer or "bpe",
        vocab_size=args.vocab_size,
        val_fraction=0.05 if args.val_fraction is None else args.val_fraction,
        val=args.val,
        out=args.out,
        cache_dir=args.cache_dir,
        errors=args.errors or "strict",
        encoding=args.encoding or "utf-8",
        text_column=args.text_column or "text",
        workers=args.workers,
        say=terminal.say,
    )
