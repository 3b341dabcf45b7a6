"""Which text is for training and which is held out, decided by content alone.

Documents are ordered by the hash of their text and held out from the start of that order until
their share of all bytes is reached; so the split does not depend on names or order, and copies of a
text fall on one side. A single document gives its tail. What this room does not do: tokenize.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minillm.documents import Source
from minillm.errors import UsageError


@dataclass(frozen=True)
class Survey:
    """What one pass over N documents found.

    hashes: (N, 2) uint64, 128 bits of each text's sha256. sizes: (N,) UTF-8 bytes. digest: of all
    texts in their order. characters: those that occur, if they were asked for. n_characters: the
    length of the last document.
    """

    hashes: np.ndarray
    sizes: np.ndarray
    digest: str
    characters: str
    n_characters: int


@dataclass(frozen=True)
class Text:
    """Documents together with what they were found to hold, so that a change is noticed."""

    source: Source
    errors: str
    survey: Survey


@dataclass(frozen=True)
class Split:
    """is_val: (N,) bool; cut: where a single document is cut, in characters, or None.

    bytes and documents count each side, under "train" and "val".
    """

    is_val: np.ndarray
    cut: int | None
    bytes: dict[str, int]
    documents: dict[str, int]


def survey(source: Source, errors: str, want_characters: bool) -> Text:
    """Read all documents once; UsageError if there is no text in them.

    Memory: one document, and 24 bytes for each.
    """
    hashes, sizes = bytearray(), bytearray()
    everything = hashlib.sha256()
    characters: set[str] = set()
    n_characters = 0
    for document in source.documents(errors):
        data = document.text.encode("utf-8")
        fingerprint = _hash(data)
        hashes += fingerprint
        sizes += len(data).to_bytes(8, "little")
        everything.update(fingerprint)
        n_characters = len(document.text)
        if want_characters:
            characters.update(document.text)
    if not sizes:
        raise UsageError(f"{source.description}: no text, only nothing or white space")
    found = Survey(
        hashes=np.frombuffer(bytes(hashes), ">u8").reshape(-1, 2),
        sizes=np.frombuffer(bytes(sizes), "<u8").astype(np.int64),
        digest=everything.hexdigest(),
        characters="".join(sorted(characters)),
        n_characters=n_characters,
    )
    return Text(source, errors, found)


def split(text: Text, fraction: float) -> Split:
    """Hold out `fraction` (0 to 0.5) of the bytes of `text`.

    A document that would take the held-out share above twice the fraction is passed over, so that
    chance never holds out the one large document; if all are too large, the smallest is held out.
    With a fraction above 0 both sides get text. A single document is cut after
    int(n_characters * (1 - fraction)) characters, as nanoGPT does with 0.1.
    """
    if not 0 <= fraction <= 0.5:
        raise UsageError(f"--val-fraction {fraction}: expected 0 (nothing held out) to 0.5")
    sizes = text.survey.sizes
    if len(sizes) == 1 and fraction > 0:
        return _split_single(text, fraction)
    is_val = _held_out(text, fraction) if fraction > 0 else np.zeros(len(sizes), bool)
    sides = {"train": ~is_val, "val": is_val}
    return Split(
        is_val,
        None,
        bytes={name: int(sizes[side].sum()) for name, side in sides.items()},
        documents={name: int(side.sum()) for name, side in sides.items()},
    )


def parts(text: Text, plan: Split) -> Iterator[tuple[str, str]]:
    """Stream ("train" or "val", text) in reading order; UsageError if a document has changed."""
    hashes = text.survey.hashes
    count = 0
    for document in text.source.documents(text.errors):
        is_known = count < len(hashes)
        if not is_known or _hash(document.text.encode("utf-8")) != hashes[count].tobytes():
            raise UsageError(f"{document.name}: changed while it was being read; run again")
        if plan.cut is not None:
            yield "train", document.text[: plan.cut]
            yield "val", document.text[plan.cut :]
        else:
            yield ("val" if plan.is_val[count] else "train"), document.text
        count += 1
    if count != len(hashes):
        raise UsageError(f"{text.source.description}: lost a document while it was being read")


def _split_single(text: Text, fraction: float) -> Split:
    cut = int(text.survey.n_characters * (1 - fraction))
    if not 0 < cut < text.survey.n_characters:
        raise UsageError(
            f"{text.source.description}: {text.survey.n_characters} characters are too few to hold "
            f"out {fraction:g} of them; give more text or --val-fraction 0"
        )
    is_val = np.zeros(1, bool)
    sizes = {"train": 0, "val": 0}
    for side, part in parts(text, Split(is_val, cut, {}, {})):
        sizes[side] += len(part.encode("utf-8"))
    return Split(is_val, cut, sizes, {"train": 1, "val": 1})


def _held_out(text: Text, fraction: float) -> np.ndarray:
    hashes, sizes = text.survey.hashes, text.survey.sizes
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    differs = np.any(hashes[order][1:] != hashes[order][:-1], axis=1)
    starts = np.flatnonzero(np.concatenate([[True], differs]))
    if len(starts) == 1:
        raise UsageError(
            f"{text.source.description}: all {len(sizes)} documents are the same text; "
            "give it once, or pass --val-fraction 0"
        )
    # A group holds the copies of one text.
    group_sizes = np.add.reduceat(sizes[order], starts)
    total = int(sizes.sum())
    most = min(2 * fraction, (1 + fraction) / 2) * total
    chosen, taken = [], 0
    for group, size in enumerate(group_sizes.tolist()):
        if taken >= fraction * total:
            break
        if taken + size <= most:
            chosen.append(group)
            taken += size
    if not chosen:
        chosen = [int(group_sizes.argmin())]
    group_of = np.concatenate([[0], np.cumsum(differs)])
    is_val = np.zeros(len(sizes), bool)
    is_val[order] = np.isin(group_of, chosen)
    return is_val


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]
