"""Tokenizers: SentencePiece BPE, characters or bytes, with the same methods.

`encode` never adds the beginning-of-document token (BOS). `decode_bytes` gives a token's bytes, so
that a stream can wait for the rest of a character. Decoding gives back exactly the encoded text.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import sentencepiece

from minillm.data.bpe import lines, train_bpe
from minillm.data.plain_text import refuse_surrogates
from minillm.data.sentencepieces import MARK, bytes_of_pieces, drops_space
from minillm.data.tokenizer_base import Tokenizer, UnknownCharacterError
from minillm.data.tokenizer_sandbox import try_model
from minillm.errors import CorruptError, UsageError, parameter
from minillm.runtime.files import naming
from minillm.runtime.pickles import refuse_pickle

MAX_BYTES = 64 << 20  # size of a tokenizer's file
KINDS = ("bpe", "char", "byte")


class BpeTokenizer(Tokenizer):
    """A SentencePiece model, ours or one from elsewhere.

    Texts are encoded line by line. Our models give the same ids as for the whole text, because no
    piece contains a newline and nothing is put before the first word. Lines longer than
    bpe.LINE_LIMIT characters are split there, which is lossless, but the ids at the split may
    differ. Models from elsewhere for which this does not hold encode whole texts.

    model: content of the model's file
    """

    kind = "bpe"
    file_name = "tokenizer.model"

    def __init__(self, model: bytes) -> None:
        if not model:  # SentencePiece would accept it as a model without pieces
            raise RuntimeError("the file is empty")
        self._model = model
        self._pieces = pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = pieces.vocab_size()
        self.bos_id = pieces.bos_id() if pieces.bos_id() >= 0 else None
        self._bytes_of = bytes_of_pieces(pieces)
        self._drops_space = drops_space(pieces)
        self._mark = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in MARK.encode()]
        probes = (
            "",
            "a b",
            " a\n\n\tb  c\r\n",
            "x = 1\n    y\n",
            "a" + MARK + "b\n\u00e9\U0001f642",
        )
        has_bytes = all(pieces.is_byte(i) for i in self._mark)
        crosses = any(b"\n" in piece[:-1] for piece in self._bytes_of)
        self.by_lines = has_bytes and not crosses and all(map(self._split_safely, probes))
        if any(self.decode(self.encode(probe)) != probe for probe in probes):
            self.note = (
                "this tokenizer is not lossless: decoding does not give back the encoded text"
            )

    def at_start(self, token: int) -> tuple[bytes, bool]:
        """Return a token's bytes at the start of a text, and whether the next is there too."""
        data = self.decode_bytes([token])
        if not self._drops_space or not self._pieces.id_to_piece(token).startswith(MARK):
            return data, not data
        # SentencePiece put this space before the text.
        return data[1:], self._drops_space == "all" and len(data) == 1

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; raise UsageError if it has half a surrogate pair."""
        try:
            if not self.by_lines:
                return self._pieces.encode(text)
            if MARK in text:
                return self._encode_marked(lines(text))
            return list(chain.from_iterable(self._pieces.encode(lines(text), num_threads=1)))
        except (RuntimeError, TypeError):
            refuse_surrogates(text)
            raise

    def _encode_marked(self, parts: Sequence[str]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            for number, piece in enumerate(part.split(MARK)):
                ids += (self._mark if number else []) + self._pieces.encode(piece)
        return ids

    def _split_safely(self, text: str) -> bool:
        text = text.replace(MARK, "")
        parts = self._pieces.encode(lines(text))
        return self._pieces.encode(text) == list(chain.from_iterable(parts))

    def to_bytes(self) -> bytes:
        """Return the serialized SentencePiece model."""
        return self._model


class CharTokenizer(Tokenizer):
    """One token for each of the given characters, sorted by code point; no special token.

    characters: the characters, in any order
    """

    kind = "char"

    def __init__(self, characters: Iterable[str]) -> None:
        self._characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self._characters)
        self._id_of = {character: i for i, character in enumerate(self._characters)}
        self._bytes_of = [c.encode("utf-8") for c in self._characters]

    def encode(self, text: str) -> list[int]:
        """Return one id for each character; raise UsageError on a character without an id."""
        try:
            return [self._id_of[c] for c in text]
        except KeyError:
            at = self.unknown(text)
            raise UnknownCharacterError(
                f"character {text[at]!a} at position {at} is not among the {self.vocab_size} "
                "characters this tokenizer was made from"
            ) from None

    def unknown(self, text: str) -> int | None:
        """Return the position of the first character without an id, or None."""
        return next((i for i, c in enumerate(text) if c not in self._id_of), None)

    def to_bytes(self) -> bytes:
        """Return JSON with version, kind and characters."""
        return _own_json(kind="char", characters=self._characters)


class ByteTokenizer(Tokenizer):
    """One token for each byte of UTF-8, and token 256 for the beginning of a document."""

    kind = "byte"
    vocab_size = 257
    bos_id = 256

    def __init__(self) -> None:
        self._bytes_of = [bytes([i]) for i in range(256)] + [b""]

    def encode(self, text: str) -> list[int]:
        """Return one id for each byte; raise UsageError if the text has half a surrogate pair."""
        refuse_surrogates(text)
        return list(text.encode("utf-8"))

    def to_bytes(self) -> bytes:
        """Return JSON with version and kind."""
        return _own_json(kind="byte")


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """Return a tokenizer made from texts; the same texts give the same tokenizer.

    kind: "bpe", "char" or "byte"
    texts: the texts to train on
    vocab_size: number of tokens of bpe; the tokenizer has fewer if the texts do not support them
    """
    if kind == "char":
        return CharTokenizer(chain.from_iterable(texts))
    if kind == "byte":
        return ByteTokenizer()
    if kind != "bpe":
        raise UsageError(
            f"{parameter('tokenizer')} {kind}: expected {', '.join(KINDS)} or a tokenizer's file"
        )
    if vocab_size is None:
        raise UsageError("a bpe tokenizer needs a vocabulary size")
    return BpeTokenizer(train_bpe(texts, vocab_size))


def load_tokenizer(path: str | Path, foreign: bool = False) -> Tokenizer:
    """Return the tokenizer in a file, tokenizer.model or our own tokenizer.json.

    path: the file
    foreign: True if no sha256 is known for the file; a model is then loaded in another process
        first, as it may crash
    Raises UsageError or CorruptError.
    """
    path, expected = Path(path), "a tokenizer (.model or .json)"
    if not path.is_file():
        raise UsageError(f"{path}: no such file; expected {expected}")
    refuse_pickle(path, expected)
    if path.stat().st_size > MAX_BYTES:
        raise CorruptError(f"{path}: larger than {MAX_BYTES >> 20} MiB; no tokenizer is")
    with naming(path):
        data = path.read_bytes()
    if path.suffix == ".json" or (data.lstrip()[:1] == b"{" and b"\0" not in data):  # not a model
        return _from_json(path, data)
    if foreign:
        try_model(path, data)
    try:
        return BpeTokenizer(data)
    except (RuntimeError, ValueError):  # ValueError: pieces that are not UTF-8
        raise CorruptError(f"{path}: not a SentencePiece model, or damaged") from None


def _from_json(path: Path, data: bytes) -> Tokenizer:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise CorruptError(f"{path}: not valid JSON, or damaged") from None
    content = content if isinstance(content, dict) else {}
    kind, characters = content.get("kind"), content.get("characters")
    if content.get("version") == 1 and kind == "byte":
        return ByteTokenizer()
    if content.get("version") == 1 and kind == "char" and isinstance(characters, str):
        refuse_surrogates(characters)
        if characters and characters == "".join(sorted(set(characters))):
            return CharTokenizer(characters)
        raise CorruptError(f"{path}: its characters are not sorted, or not all different")
    raise UsageError(
        f"{path}: not a tokenizer of minillm (a Hugging Face tokenizer.json is not read); "
        "expected a SentencePiece .model, or our own .json of kind char or byte, version 1"
    )


def _own_json(**content: str) -> bytes:
    return (json.dumps({"version": 1, **content}) + "\n").encode("ascii")
