"""How a BPE vocabulary is sized and trained, and how text is cut into lines for SentencePiece.

What this room does not do: encode. The settings make the model lossless: no normalisation, no space
before the first word, every run of spaces and every newline kept, rare characters as their bytes.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from itertools import chain

import sentencepiece

from minillm.errors import UsageError

# SentencePiece writes this character for what it does not know, and skips every line that has it.
RESERVED = "\u2585"
# SentencePiece is super-linear in the length of a line; longer ones are cut.
LINE_LIMIT = 16_384
SAMPLE_BYTES = 20_000_000
# 256 bytes, <unk>, <s>, </s> and the newline, and some room for characters.
MIN_VOCAB = 320
MAX_VOCAB = 1_000_000


def lines(text: str) -> list[str]:
    """`text` cut after each newline, and lines above LINE_LIMIT characters cut there too."""
    # Not str.splitlines, which also cuts at \r, \v, \f, U+0085, U+2028 ...
    parts = [line + "\n" for line in text.split("\n")]
    parts[-1] = parts[-1][:-1]
    if not parts[-1]:
        parts.pop()
    if len(text) <= LINE_LIMIT:
        return parts
    return [p[i : i + LINE_LIMIT] for p in parts for i in range(0, len(p), LINE_LIMIT)]


def choose_vocab_size(n_bytes: int) -> int:
    """A BPE vocabulary for a corpus of `n_bytes`: 512 at 100 kB, 4096 at 11 MB, 32768 at 1 GB.

        2 ** round(log2(512 * (n_bytes / 100 kB) ** 0.45))

    The number of different words in a text grows with about the square root of its length (Heaps'
    law), and a token should be seen some hundred times to be learned. Powers of two, so that a few
    files more or less leave the choice, and with it the model, as they were.
    """
    wanted = 512 * (max(n_bytes, 1) / 1e5) ** 0.45
    size = 512
    while size < 32_768 and size * 2**0.5 < wanted:
        size *= 2
    return size


def check_vocab_size(vocab_size: int) -> None:
    """Raise UsageError if no bpe tokenizer can have that many tokens."""
    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise UsageError(
            f"--vocab-size {vocab_size}: bpe takes {MIN_VOCAB} (256 bytes, 4 symbols, common "
            f"characters) to {MAX_VOCAB}"
        )


def train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a SentencePiece model on a sample of the lines of `texts`; return its file's content.

    vocab_size: MIN_VOCAB to MAX_VOCAB; the model has fewer where the texts do not support as many.
    The same texts give the same bytes. Takes 1.7 s and 200 MB for 11 MB of text.
    """
    check_vocab_size(vocab_size)
    sample = _sample(texts)
    symbols = ["\n"]
    if any(RESERVED in line for line in sample):
        # As a symbol of its own it is one token. The lines go on without it, cut where it stood.
        symbols.append(RESERVED)
        sample = [line.replace(RESERVED, "\n") for line in sample]
        sample = [line for line in sample if line.strip("\n")] or [" "]
    try:
        return _train(sample, vocab_size, symbols)
    except RuntimeError as error:
        if "required_chars" not in str(error):
            raise _untrainable() from error
    try:
        # Scripts of thousands of characters: the rare ones are left to their bytes.
        return _train(_without_rare_characters(sample, vocab_size), vocab_size, symbols)
    except RuntimeError as error:
        raise _untrainable() from error


def _untrainable() -> UsageError:
    # What SentencePiece says names a line of its own source; --debug shows it.
    return UsageError("no bpe tokenizer can be trained on this text; use --tokenizer byte")


def _train(sample: Sequence[str], vocab_size: int, symbols: Sequence[str]) -> bytes:
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=0.9999,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=list(symbols),
        # A space, as SentencePiece writes it: to be known even if the text holds none.
        required_chars="\u2581",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        max_sentence_length=1 << 20,
        # The number of threads is written into the model: one, so that machines agree.
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _sample(texts: Iterable[str], limit: int = SAMPLE_BYTES) -> list[str]:
    """At most `limit` bytes of lines, each kept with the same chance, in the order of the text."""
    draw = random.Random(1337)
    kept: list[tuple[float, str]] = []
    rate, size = 1.0, 0
    for line in chain.from_iterable(map(_sentences, texts)):
        luck = draw.random()
        if luck >= rate:
            continue
        kept.append((luck, line))
        size += len(line.encode("utf-8"))
        while size > limit:
            rate /= 2
            kept = [entry for entry in kept if entry[0] < rate]
            size = sum(len(line.encode("utf-8")) for _, line in kept)
    return [line for _, line in kept]


def _sentences(text: str) -> Iterator[str]:
    return (line.rstrip("\n") for line in lines(text) if line != "\n")


def _without_rare_characters(sample: Sequence[str], vocab_size: int) -> list[str]:
    """Keep as many characters as half of the vocabulary beyond its 260 fixed tokens can hold."""
    counts = Counter(chain.from_iterable(sample))
    rare = [c for c, _ in counts.most_common()[(vocab_size - 260) // 2 :]]
    # A newline, which is a token of its own: what stood on both sides must not seem adjacent.
    return [line.translate(dict.fromkeys(map(ord, rare), "\n")) for line in sample]
