"""Report the held-out text of a prepared corpus, and warn if it is little."""

from minillm.data.shards import Corpus
from minillm.errors import UsageError, parameter
from minillm.runtime.units import things

FEW_TOKENS = 300  # a loss on fewer held-out tokens says little


def about(corpus: Corpus, seconds: float | None = None) -> str:
    """Return lines about a corpus: its size, what is held out, and a warning if that is little.

    corpus: the prepared corpus
    seconds: how long its preparation took; None if it was found prepared
    """
    n_bytes, n_tokens = sum(corpus.bytes.values()), sum(corpus.tokens.values())
    spent = "found prepared" if seconds is None else f"in {seconds:.1f} s"
    size = (
        f"corpus    {corpus.folder}: {things(corpus.documents['train'], 'document')} and "
        f"{corpus.documents['val']:,} held out, {n_bytes:,} bytes, {n_tokens:,} tokens, vocabulary "
        f"{corpus.vocab_size:,}, {n_bytes / n_tokens:.2f} bytes per token, {spent}"
    )
    return "\n".join([size, *_about_held_out(corpus), *_warnings(corpus)])


def _about_held_out(corpus: Corpus) -> list[str]:
    held, total = corpus.bytes["val"], sum(corpus.bytes.values())
    if not held:
        return []
    names = list(corpus.held_out)
    if names and (more := corpus.documents["val"] - len(names)) > 0:
        names.append(f"{more:,} more")
    last = f" and {names.pop()}" if len(names) > 1 else ""
    named = f": {', '.join(names)}{last}" if names else ""
    return [f"text      held out {held:,} of {total:,} bytes ({held / total:.1%}){named}"]


def _warnings(corpus: Corpus) -> list[str]:
    """Return warnings if the held-out share is far from the requested one, or very small."""
    share = corpus.bytes["val"] / sum(corpus.bytes.values())
    asked = corpus.settings.get("val_fraction")
    if corpus.sequence or asked == 0:
        return []
    found = []
    if asked is not None and not asked / 3 <= share <= 3 * asked:
        found.append(
            f"warning   {share:.1%} of the text is held out, {asked:.1%} was asked for: the "
            "documents are too few or too unequal; name validation text with --val"
        )
    if corpus.tokens["val"] < FEW_TOKENS:
        found.append(
            f"warning   only {corpus.tokens['val']} tokens are held out, and a loss on so few says "
            "little; give more text, or name validation text with --val"
        )
    return found


def require_validation(corpus: Corpus, early_stop: int) -> Corpus:
    """Return the corpus, or raise UsageError if it has no validation text for early stopping.

    corpus: the prepared corpus
    early_stop: evaluations without improvement after which to stop; 0 for no early stopping
    """
    if early_stop and corpus.tokens["val"] < 2:
        raise UsageError(
            f"{parameter('early_stop')} {early_stop}: {corpus.folder} has {corpus.tokens['val']} "
            "tokens of validation text; give more text, or name validation text with "
            f"{parameter('val')}"
        )
    return corpus
