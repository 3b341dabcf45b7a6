"""Read the text once to know the hash and the size of each document.

split.py decides by them which documents are held out.
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
    """Facts about N documents, found in one pass.

    hashes: (N, 2) uint64, 128 bits of each text's sha256
    sizes: (N,) int64, UTF-8 bytes of each text
    digest: sha256 of all texts in their order, without validation text that is given separately
    characters: the different characters, if they were asked for
    n_characters: length of the last document in characters
    n_given: number of documents of validation text given separately, which come last
    given_digest: sha256 of these
    skipped: number of files that are not read, by the reason, as in Source
    has_reserved: True if bpe.RESERVED occurs
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
    """Documents, with the survey by which a later change of them is noticed.

    source: the text to train on, or to split
    errors: "strict" or "replace", for bytes that are invalid in the encoding
    survey: facts about the documents
    validation: validation text, if it is given separately
    """

    source: Source
    errors: str
    survey: Survey
    validation: Source | None = None

    def documents(self) -> Iterator[Document]:
        """Stream all documents; those of separate validation text come last."""
        sources = [self.source, *([self.validation] if self.validation else [])]
        return chain.from_iterable(source.documents(self.errors) for source in sources)


def survey(
    source: Source, errors: str, want_characters: bool, validation: Source | None = None
) -> Text:
    """Read all documents once, with one document in memory and 24 bytes for each.

    source: the text to train on, or to split
    errors: "strict" or "replace", for bytes that are invalid in the encoding
    want_characters: whether to collect the different characters
    validation: validation text, if it is given separately
    Raises UsageError if there is no text.
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
            raise UsageError(
                f"{part.description}: no text; its files are empty or have only white space"
            )
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
