"""What one pass over the text finds: the hash and the size of each document.

This module does not decide what is held out (split.py).
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from minillm.data.bpe import RESERVED
from minillm.data.documents import Document, Source
from minillm.errors import UsageError


@dataclass(frozen=True)
class Survey:
    """What one pass over N documents found.

    hashes: (N, 2) uint64, 128 bits of each text's sha256.
    sizes: (N,) UTF-8 bytes.
    digest: of all texts in their order, without the validation text that is named by itself.
    characters: those that occur, if they were asked for.
    n_characters: the length of the last document.
    n_given: how many documents, the last ones, are validation text that is named by itself.
    given_digest: of these.
    skipped: what was passed over, as Source counts it.
    has_reserved: whether bpe.RESERVED occurs.
    """

    hashes: np.ndarray
    sizes: np.ndarray
    digest: str
    characters: str
    n_characters: int
    n_given: int = 0
    given_digest: str = ""
    skipped: Counter[str] = field(default_factory=Counter)
    has_reserved: bool = False


@dataclass(frozen=True)
class Text:
    """Documents together with what they were found to hold, so that a change is noticed.

    validation: the text that is held out, where it is named by itself.
    """

    source: Source
    errors: str
    survey: Survey
    validation: Source | None = None

    def documents(self) -> Iterator[Document]:
        """Stream all documents, those of the validation text last."""
        sources = [self.source, *([self.validation] if self.validation else [])]
        return chain.from_iterable(source.documents(self.errors) for source in sources)


def survey(
    source: Source, errors: str, want_characters: bool, validation: Source | None = None
) -> Text:
    """Read all documents once; UsageError if there is no text in them.

    Memory: one document, and 24 bytes for each.
    """
    hashes, sizes = bytearray(), bytearray()
    digests, counts, n_characters, has_reserved = [], [], 0, False
    characters: set[str] = set()
    skipped = Counter(source.skipped)
    for part in (source, validation):
        everything, before = hashlib.sha256(), len(sizes)
        if part is validation and part is not None:
            skipped.update(part.skipped)
        for document in part.documents(errors, skipped) if part is not None else ():
            data = document.text.encode("utf-8")
            short = fingerprint(data)
            hashes += short
            sizes += len(data).to_bytes(8, "little")
            everything.update(short)
            n_characters = len(document.text)
            has_reserved = has_reserved or RESERVED in document.text
            if want_characters:
                characters.update(document.text)
        if part is not None and len(sizes) == before:
            raise UsageError(f"{part.description}: no text, only nothing or white space")
        digests.append(everything.hexdigest())
        counts.append((len(sizes) - before) // 8)
    found = Survey(
        hashes=np.frombuffer(bytes(hashes), ">u8").reshape(-1, 2),
        sizes=np.frombuffer(bytes(sizes), "<u8").astype(np.int64),
        digest=digests[0],
        characters="".join(sorted(characters)),
        n_characters=n_characters,
        n_given=counts[1],
        given_digest=digests[1] if validation else "",
        skipped=skipped,
        has_reserved=has_reserved,
    )
    return Text(source, errors, found, validation)


def fingerprint(data: bytes) -> bytes:
    """Return 128 bits of the sha256 of `data`."""
    return hashlib.sha256(data).digest()[:16]
