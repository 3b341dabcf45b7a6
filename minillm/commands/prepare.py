"""`python -m minillm prepare`: turn text into a tokenizer and token shards."""

from collections.abc import Sequence

from minillm.config.resolve import PREPARED
from minillm.config.train import TrainConfig
from minillm.data.prepare import Preparation, prepare, refuse_settings
from minillm.data.shards import is_prepared
from minillm.flags import prepare as flags
from minillm.runtime import terminal


def main(argv: Sequence[str]) -> None:
    """Prepare the text that the command line names; messages go to standard error."""
    args = flags.parse(argv)
    given = {name: value for name in PREPARED if (value := getattr(args, name)) is not None}
    for folder in filter(is_prepared, args.paths[:1]):
        refuse_settings(folder, given)
    how = Preparation(
        **{"val_fraction": TrainConfig.val_fraction, **given},
        vocab_size=args.vocab_size,
        workers=args.workers,
    )
    prepare(args.paths or None, how, out=args.out, cache_dir=args.cache_dir, say=terminal.say)
