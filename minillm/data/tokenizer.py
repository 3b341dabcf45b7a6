"""Text to token ids and back: SentencePiece BPE, characters or bytes, behind four methods.

`encode` never adds the beginning-of-document token; `decode_bytes` gives a token's raw bytes, so
that a stream can wait for the rest of a character. Decoding gives back exactly what was encoded.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import sentencepiece

from minillm.data.bpe import lines, train_bpe
from minillm.data.plain_text import refuse_surrogates
from minillm.data.sentencepieces import MARK, bytes_of_pieces, drops_space
from minillm.data.tokenizer_sandbox import try_model
from minillm.errors import CorruptError, UsageError
from minillm.runtime.files import naming, write_durably
from minillm.runtime.pickles import refuse_pickle

MAX_BYTES = 64 << 20  # of a tokenizer's file
KINDS = ("bpe", "char", "byte")


class UnknownCharacterError(UsageError):
    """A character that a tokenizer has no id for."""


class Tokenizer:
    """What all kinds share. ids: 0 <= id < vocab_size; bos_id: None where there is none."""

    kind: str
    vocab_size: int
    bos_id: int | None = None
    # The file `save` writes, and what to tell the user about a tokenizer from elsewhere.
    file_name = "tokenizer.json"
    note = ""
    # True when a text may be cut where `lines` cuts it without changing its ids.
    by_lines = True
    _bytes_of: list[bytes]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without a beginning-of-document token."""
        raise NotImplementedError

    def prompt_ids(self, prompt: str, one_document: bool = False) -> list[int]:
        """Return what a model reads to continue `prompt`: BOS, if there is one, and its ids.

        one_document: for models with a document mask, which see nothing before BOS.
        An empty prompt is the end of a line and BOS, or the former without the latter. In training
        BOS almost never begins a window: after it alone a model often begins in mid-word.
        """
        line_break = [self._bytes_of.index(b"\n")] if b"\n" in self._bytes_of else []
        if self.bos_id is None:
            return self.encode(prompt) or line_break or [0]
        return line_break * (not prompt and not one_document) + [self.bos_id, *self.encode(prompt)]

    def heal(self, ids: Sequence[int]) -> tuple[list[int], list[int], int]:
        """Give a prompt's last token back to the model, if a longer token begins like it.

        After "def " the model has never seen a space by itself: what followed was always one token,
        " name". So the last token is taken away, and the first new one must begin with its bytes.
        Returns (ids, the tokens that may come first (empty: any), bytes of them already there).
        Source: "token healing", Lundberg 2023, for the guidance library.
        """
        last = self._bytes_of[ids[-1]]
        allowed = [i for i, piece in enumerate(self._bytes_of) if last and piece.startswith(last)]
        # A byte and a piece of that byte alone are equally long: there is nothing to heal.
        if len(ids) < 2 or all(len(self._bytes_of[i]) == len(last) for i in allowed):
            return list(ids), [], 0
        return list(ids[:-1]), allowed, len(last)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The raw bytes of `ids`; special tokens are empty."""
        ids = list(ids)
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            span = f"{min(ids)} to {max(ids)}"
            raise UsageError(f"token ids must be 0 to {self.vocab_size - 1}, got {span}")
        return b"".join([self._bytes_of[i] for i in ids])

    def at_start(self, token: int) -> tuple[bytes, bool]:
        """Return a token's bytes at the start of a text, and whether the next one is there too.

        They differ from decode_bytes where a space was put before the first word.
        """
        data = self.decode_bytes([token])
        return data, not data

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, which start a text; bytes that are no UTF-8 become U+FFFD."""
        rest, first, starts = list(ids), b"", True
        while rest and starts:
            data, starts = self.at_start(rest.pop(0))
            first += data
        return (first + self.decode_bytes(rest)).decode("utf-8", "replace")

    def to_bytes(self) -> bytes:
        """The content of the tokenizer's file."""
        raise NotImplementedError

    @property
    def sha256(self) -> str:
        """The digest of the tokenizer's file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, folder: Path) -> Path:
        """Write the tokenizer's file into `folder` and return its path."""
        path = Path(folder, self.file_name)
        write_durably(path, self.to_bytes())
        return path


class BpeTokenizer(Tokenizer):
    """A SentencePiece model, ours or a foreign one.

    Texts are encoded line by line. Our models give the same ids as for the whole text, because no
    piece holds a newline and nothing is put before the first word; lines above bpe.LINE_LIMIT
    characters are cut there (lossless, but the ids at the cut may differ). Foreign models for which
    this does not hold get whole texts.
    """

    kind = "bpe"
    file_name = "tokenizer.model"

    def __init__(self, model: bytes) -> None:
        if not model:  # SentencePiece would accept it, as a model of no pieces
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
            self.note = "this tokenizer is not lossless: decoding does not give the text back"

    def at_start(self, token: int) -> tuple[bytes, bool]:
        """Return a token's bytes at the start of a text, and whether the next one is there too."""
        data = self.decode_bytes([token])
        if not self._drops_space or not self._pieces.id_to_piece(token).startswith(MARK):
            return data, not data
        # Where spaces at the start are dropped from texts, it was put before each of them.
        return data[1:], self._drops_space == "all" and len(data) == 1

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; UsageError if it holds half a surrogate pair."""
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
        """The serialized SentencePiece model."""
        return self._model


class CharTokenizer(Tokenizer):
    """Exactly the given characters, sorted by code point; no special token."""

    kind = "char"

    def __init__(self, characters: Iterable[str]) -> None:
        self._characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self._characters)
        self._id_of = {character: i for i, character in enumerate(self._characters)}
        self._bytes_of = [c.encode("utf-8") for c in self._characters]

    def encode(self, text: str) -> list[int]:
        """One id a character; UsageError naming one the tokenizer does not know."""
        try:
            return [self._id_of[c] for c in text]
        except KeyError:
            at = self.unknown(text)
            raise UnknownCharacterError(
                f"character {text[at]!a} at position {at} is not among the {self.vocab_size} "
                "characters this tokenizer was made from"
            ) from None

    def unknown(self, text: str) -> int | None:
        """Return the position of the first character that has no id; None if all have one."""
        return next((i for i, c in enumerate(text) if c not in self._id_of), None)

    def to_bytes(self) -> bytes:
        """Our own small JSON: version, kind, characters."""
        return _own_json(kind="char", characters=self._characters)


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and 256 for the beginning of a document."""

    kind = "byte"
    vocab_size = 257
    bos_id = 256

    def __init__(self) -> None:
        self._bytes_of = [bytes([i]) for i in range(256)] + [b""]

    def encode(self, text: str) -> list[int]:
        """One id a byte; UsageError if the text holds half a surrogate pair."""
        refuse_surrogates(text)
        return list(text.encode("utf-8"))

    def to_bytes(self) -> bytes:
        """Our own small JSON: version and kind."""
        return _own_json(kind="byte")


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """Make a tokenizer of `kind` from `texts`; the same texts give the same tokenizer.

    vocab_size: for bpe alone. Less comes back where the texts do not support as many.
    """
    if kind == "char":
        return CharTokenizer(chain.from_iterable(texts))
    if kind == "byte":
        return ByteTokenizer()
    if kind != "bpe":
        raise UsageError(f"--tokenizer {kind}: expected {', '.join(KINDS)} or a tokenizer's file")
    if vocab_size is None:
        raise UsageError("a bpe tokenizer needs a vocabulary size")
    return BpeTokenizer(train_bpe(texts, vocab_size))


def load_tokenizer(path: str | Path, foreign: bool = False) -> Tokenizer:
    """Read tokenizer.model or our own tokenizer.json; UsageError or CorruptError in one line.

    foreign: nobody vouches for the file by its sha256, so a model is tried in another process
    first.
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
    except (RuntimeError, ValueError):  # ValueError: pieces that are no UTF-8
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
        raise CorruptError(f"{path}: its characters are not sorted and different")
    raise UsageError(
        f"{path}: not a tokenizer of minillm (a Hugging Face tokenizer.json is not read); "
        "expected a SentencePiece .model, or our own .json of kind char or byte, version 1"
    )


def _own_json(**content: str) -> bytes:
    return (json.dumps({"version": 1, **content}) + "\n").encode("ascii")
