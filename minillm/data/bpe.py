"""Choose the size of a BPE vocabulary, train it, and split text into lines for SentencePiece.

The settings make the model lossless: no normalisation, no space before the first word, every run of
spaces and every newline kept, rare characters as their bytes.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from itertools import chain

import sentencepiece

from minillm.errors import UsageError, parameter

# SentencePiece writes this character for an unknown one, and skips every line that contains it.
RESERVED = "\u2585"
# SentencePiece takes more than linear time in the length of a line; longer lines are split.
LINE_LIMIT = 16_384
SAMPLE_BYTES = 20_000_000
# 256 bytes, <unk>, <s>, </s>, the newline, and 60 tokens for characters.
MIN_VOCAB = 320
MAX_VOCAB = 1_000_000


def lines(text: str) -> list[str]:
    """Split text after each newline, and lines above LINE_LIMIT characters at that length."""
    # Not str.splitlines, which also splits at \r, \v, \f, U+0085, U+2028 ...
    parts = [line + "\n" for line in text.split("\n")]
    parts[-1] = parts[-1][:-1]
    if not parts[-1]:
        parts.pop()
    if len(text) <= LINE_LIMIT:
        return parts
    return [p[i : i + LINE_LIMIT] for p in parts for i in range(0, len(p), LINE_LIMIT)]


def choose_vocab_size(n_bytes: int) -> int:
    """Return the size of a BPE vocabulary: 512 for 100 kB of text, 4096 for 11 MB, 32768 for 1 GB.

        2 ** round(log2(512 * (n_bytes / 100 kB) ** 0.45))

    The number of different words in a text grows with about the square root of its length (Heaps'
    law), and the model must see a token about a hundred times to learn it. The size is a power of
    two, so that a few files more or less do not change it, and with it the model.

    n_bytes: UTF-8 bytes of the text
    """
    wanted = 512 * (max(n_bytes, 1) / 1e5) ** 0.45
    size = 512
    while size < 32_768 and size * 2**0.5 < wanted:
        size *= 2
    return size


def check_vocab_size(vocab_size: int) -> None:
    """Raise UsageError if no bpe tokenizer can have this number of tokens."""
    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise UsageError(
            f"{parameter('vocab_size')} {vocab_size}: bpe takes {MIN_VOCAB} (256 bytes, 4 symbols, "
            f"common characters) to {MAX_VOCAB}"
        )


def train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a SentencePiece model on a sample of lines; return the content of its file.

    The same texts give the same bytes. 11 MB of text take 1.7 s and 200 MB of memory.

    texts: the texts to train on
    vocab_size: MIN_VOCAB to MAX_VOCAB tokens; the model has fewer if the texts do not support them
    """
    check_vocab_size(vocab_size)
    sample = _sample(texts)
    symbols = ["\n"]
    if any(RESERVED in line for line in sample):
        # It becomes one token, a symbol. The lines are split at it.
        symbols.append(RESERVED)
        sample = [line.replace(RESERVED, "\n") for line in sample]
        sample = [line for line in sample if line.strip("\n")] or [" "]
    try:
        return _train(sample, vocab_size, symbols)
    except RuntimeError as error:
        if "required_chars" not in str(error):
            raise _untrainable() from error
    try:
        # A script of thousands of characters: rare ones are encoded as their bytes.
        return _train(_without_rare_characters(sample, vocab_size), vocab_size, symbols)
    except RuntimeError as error:
        raise _untrainable() from error


def _untrainable() -> UsageError:
    # SentencePiece's own message names a line of its source; --debug shows it.
    return UsageError(
        f"no bpe tokenizer can be trained on this text; use {parameter('tokenizer')} byte"
    )


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
        # A space, as SentencePiece writes it, which must be known even if the text has none.
        required_chars="\u2581",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        max_sentence_length=1 << 20,
        # The number of threads is written into the model; 1 gives the same file on every machine.
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _sample(texts: Iterable[str], limit: int = SAMPLE_BYTES) -> list[str]:
    """Return at most `limit` bytes of random lines, in the order of the text."""
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
    """Keep the most common characters, up to half of the vocabulary beyond its 260 fixed tokens."""
    counts = Counter(chain.from_iterable(sample))
    rare = [c for c, _ in counts.most_common()[(vocab_size - 260) // 2 :]]
    # Replaced by a newline, a separate token, so that the text on both sides is not joined.
    return [line.translate(dict.fromkeys(map(ord, rare), "\n")) for line in sample]
