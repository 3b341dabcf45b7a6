"""Tokenizer, the base class of all tokenizers: prompts, token healing, decoding and saving."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from minillm.errors import UsageError
from minillm.runtime.files import write_durably


class UnknownCharacterError(UsageError):
    """A character that a tokenizer has no id for."""


class Tokenizer:
    """Base class of all tokenizers.

    kind: "bpe", "char" or "byte"
    vocab_size: number of tokens; ids are 0 to vocab_size - 1
    bos_id: id of the beginning-of-document token; None if there is none
    file_name: name of the file that `save` writes
    note: warning for the user about a tokenizer from elsewhere
    by_lines: True if a text split by `lines` has the same ids
    """

    kind: str
    vocab_size: int
    bos_id: int | None = None
    file_name = "tokenizer.json"
    note = ""
    by_lines = True
    _bytes_of: list[bytes]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without a beginning-of-document token."""
        raise NotImplementedError

    def prompt_ids(self, prompt: str, one_document: bool = False) -> list[int]:
        """Return the ids that a model continues: BOS, if there is one, and the prompt's ids.

        For an empty prompt they are a line end and BOS, or a line end alone without BOS. In
        training BOS is almost never first in a window, and after BOS alone a model often begins in
        the middle of a word.

        prompt: the text to continue
        one_document: True for models with a document mask, which see nothing before BOS
        """
        line_break = [self._bytes_of.index(b"\n")] if b"\n" in self._bytes_of else []
        if self.bos_id is None:
            return self.encode(prompt) or line_break or [0]
        return line_break * (not prompt and not one_document) + [self.bos_id, *self.encode(prompt)]

    def heal(self, ids: Sequence[int]) -> tuple[list[int], list[int], int]:
        """Remove a prompt's last token if a longer token begins with the same bytes.

        In training a model has never seen "def " with a space as the last token, because the
        space was part of the next token, " name". So the last token is removed, and the first new
        token must begin with its bytes.

        ids: ids of the prompt
        Returns the ids to continue, the tokens that may come first (empty: all), and the number of
        their bytes that are in the prompt already.
        Source: "token healing", Lundberg 2023, for the guidance library.
        """
        last = self._bytes_of[ids[-1]]
        allowed = [i for i, piece in enumerate(self._bytes_of) if last and piece.startswith(last)]
        # A byte token and a piece of the same byte are equally long, so there is nothing to heal.
        if len(ids) < 2 or all(len(self._bytes_of[i]) == len(last) for i in allowed):
            return list(ids), [], 0
        return list(ids[:-1]), allowed, len(last)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of some tokens; special tokens have no bytes."""
        ids = list(ids)
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            span = f"{min(ids)} to {max(ids)}"
            raise UsageError(f"token ids must be 0 to {self.vocab_size - 1}, got {span}")
        return b"".join([self._bytes_of[i] for i in ids])

    def at_start(self, token: int) -> tuple[bytes, bool]:
        """Return a token's bytes at the start of a text, and whether the next is there too.

        The bytes differ from decode_bytes if the tokenizer puts a space before the first word.
        """
        data = self.decode_bytes([token])
        return data, not data

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids that start a text; bytes that are not UTF-8 become U+FFFD."""
        rest, first, starts = list(ids), b"", True
        while rest and starts:
            data, starts = self.at_start(rest.pop(0))
            first += data
        return (first + self.decode_bytes(rest)).decode("utf-8", "replace")

    def to_bytes(self) -> bytes:
        """Return the content of the tokenizer's file."""
        raise NotImplementedError

    @property
    def sha256(self) -> str:
        """Digest of the tokenizer's file, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, folder: Path) -> Path:
        """Write the tokenizer's file into `folder` and return its path."""
        path = Path(folder, self.file_name)
        write_durably(path, self.to_bytes())
        return path
