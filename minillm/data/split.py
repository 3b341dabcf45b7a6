"""Split text into training and held-out text, by its content and the settings alone.

Documents are ordered by the hash of their text, and held out from the start of that order until
their share of all bytes is reached. So the split does not depend on names or order, and copies of a
text are on one side. If documents are too few or too unequal for that, the end of each large one is
held out instead. Validation text that is given separately is held out whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillm.data.survey import Text, fingerprint, survey
from minillm.errors import UsageError, parameter
from minillm.runtime.terminal import decoded

__all__ = ["Part", "Split", "Text", "held_out_names", "parts", "split", "survey"]

SIDES = ("train", "val")
TRAIN, VAL, NEITHER = 0, 1, 2
# The held-out end of a document begins after one of these, the first ones preferred.
BOUNDARIES = ("\n\n", "\n", ". ", " ")


@dataclass(frozen=True)
class Split:
    """The side of each document, train or val.

    side: (N,) int8, TRAIN, VAL or NEITHER
    cuts: {number of a document: the character from which it is held out}
    bytes: UTF-8 bytes of each side, by "train" and "val"
    documents: number of documents of each side, by "train" and "val"
    rule: "documents" (whole ones are held out), "tails" (ends of large ones) or "given" (--val)
    """

    side: np.ndarray
    cuts: dict[int, int]
    bytes: dict[str, int]
    documents: dict[str, int]
    rule: str = "documents"


class Part(NamedTuple):
    """A text, its side ("train" or "val") and its name for messages."""

    side: str
    text: str
    name: str


def split(text: Text, fraction: float, whole: bool = False) -> Split:
    """Return the split that holds out a share of the text, or its separate validation text.

    A document that would raise the held-out share above twice the fraction is not held out. If the
    others do not reach the fraction, the ends of the large documents are held out. With a fraction
    above 0 both sides get text. A single document is cut after int(n_characters * (1 - fraction))
    characters, as nanoGPT does with 0.1.

    text: the text
    fraction: share of the bytes to hold out, 0 to 0.5
    whole: hold out whole documents in any case, as the releases did whose runs record no rule
    """
    if not 0 <= fraction <= 0.5:
        raise UsageError(
            f"{parameter('val_fraction')} {fraction}: expected 0 (nothing held out) to 0.5"
        )
    sizes = text.survey.sizes
    if text.validation is not None:
        return _split_given(text)
    if fraction == 0:
        return _split_whole(text, np.zeros(len(sizes), np.int8), "documents")
    if len(sizes) == 1:
        return _split_single(text, fraction)
    groups = _groups(text)
    order, group_of, group_sizes = groups
    chosen = _chosen(group_sizes, np.arange(len(group_sizes)), fraction)
    if whole and not len(chosen):
        chosen = [int(group_sizes.argmin())]
    if not whole and group_sizes[chosen].sum() < fraction * sizes.sum():
        return _split_tails(text, fraction, groups)
    side = np.zeros(len(sizes), np.int8)
    side[order] = np.isin(group_of, chosen)
    return _split_whole(text, side, "documents")


def parts(text: Text, plan: Split) -> Iterator[Part]:
    """Stream the text of both sides in reading order.

    text: the text
    plan: split of the text
    Raises UsageError if a document has changed since the survey.
    """
    hashes = text.survey.hashes
    count = 0
    for document in text.documents():
        is_known = count < len(hashes)
        if not is_known or fingerprint(document.text.encode("utf-8")) != hashes[count].tobytes():
            raise UsageError(f"{document.name}: changed while it was being read; run again")
        if (cut := plan.cuts.get(count)) is not None:
            yield Part("train", document.text[:cut], document.name)
            yield Part("val", document.text[cut:], f"the end of {document.name}")
        elif plan.side[count] != NEITHER:
            yield Part(SIDES[plan.side[count]], document.text, document.name)
        count += 1
    if count != len(hashes):
        raise UsageError(
            f"{text.source.description}: a document disappeared while it was being read"
        )


def held_out_names(text: Text, plan: Split, limit: int) -> tuple[str, ...]:
    """Return the names of the first documents that are held out, in reading order.

    It reads the documents up to these.

    text: the text
    plan: split of the text
    limit: largest number of names
    """
    if text.validation is not None:
        found = (Path(d.name).name for d in text.validation.documents(text.errors))
    else:
        numbered = enumerate(text.documents())
        found = (
            "the end of " * (n in plan.cuts) + Path(d.name).name
            for n, d in numbered
            if n in plan.cuts or plan.side[n : n + 1] == VAL
        )
    held_out = plan.documents["val"]
    return tuple(decoded(name) for name in islice(found, min(limit, held_out)))


def _split_whole(text: Text, side: np.ndarray, rule: str) -> Split:
    """Return a split in which no document is cut."""
    on = {name: side == number for number, name in enumerate(SIDES)}
    return Split(
        side,
        {},
        bytes={name: int(text.survey.sizes[mask].sum()) for name, mask in on.items()},
        documents={name: int(mask.sum()) for name, mask in on.items()},
        rule=rule,
    )


def _split_given(text: Text) -> Split:
    """Hold out the validation text, and leave documents with the same text out of training."""
    found = text.survey
    first = len(found.sizes) - found.n_given
    held = {row.tobytes() for row in found.hashes[first:]}
    side = np.full(len(found.sizes), VAL, np.int8)
    for number in range(first):
        side[number] = NEITHER if found.hashes[number].tobytes() in held else TRAIN
    if not (side == TRAIN).any():
        raise UsageError(
            f"{parameter('val')} {text.validation.description}: holds all the text of "
            f"{parameter('data')}; nothing is left to train on"
        )
    return _split_whole(text, side, "given")


def _split_single(text: Text, fraction: float) -> Split:
    cut = int(text.survey.n_characters * (1 - fraction))
    if not 0 < cut < text.survey.n_characters:
        raise UsageError(
            f"{text.source.description}: {text.survey.n_characters} characters are too few to hold "
            f"out {fraction:g} of them; give more text or "
            f"{parameter('val_fraction')} 0"
        )
    return _with_cuts(text, np.zeros(1, np.int8), {0: cut}, "documents")


def _split_tails(
    text: Text, fraction: float, groups: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> Split:
    """Hold out the end of each document that is too large to be held out whole.

    Of the small ones the same share is held out whole, as far as that is possible.
    """
    order, group_of, group_sizes = groups
    total = int(group_sizes.sum())
    is_large = group_sizes > _most(fraction, total) - fraction * total
    chosen = _chosen(group_sizes, np.flatnonzero(~is_large), fraction)
    side = np.zeros(len(order), np.int8)
    side[order] = np.isin(group_of, chosen)
    large = np.zeros(len(order), bool)
    large[order] = is_large[group_of]
    documents = enumerate(text.documents())
    cuts = {n: _tail_start(d.text, fraction) for n, d in documents if n < len(large) and large[n]}
    cuts = {n: cut for n, cut in cuts.items() if cut}
    if not cuts and not chosen:  # documents of one character
        side[order] = group_of == group_sizes.argmin()
    return _with_cuts(text, side, cuts, "tails")


def _with_cuts(text: Text, side: np.ndarray, cuts: dict[int, int], rule: str) -> Split:
    """Return the split with these cuts; it reads the text to count bytes."""
    sizes, counts = {"train": 0, "val": 0}, {"train": 0, "val": 0}
    for part in parts(text, Split(side, cuts, {}, {})):
        sizes[part.side] += len(part.text.encode("utf-8"))
        counts[part.side] += 1
    return Split(side, cuts, sizes, counts, rule)


def _tail_start(text: str, fraction: float) -> int:
    """Return the character from which the last `fraction` of a text is held out; 0 for no cut.

    That is after a paragraph, a line, a sentence or a word, if one ends within half the length of
    the end from the exact place.
    """
    tail = max(1, round(len(text) * fraction))
    exact = len(text) - tail
    low, high = max(0, exact - tail // 2), exact + tail // 2
    for mark in BOUNDARIES:
        found = (text.rfind(mark, low, exact), text.find(mark, exact, high))
        places = [at + len(mark) for at in found if at >= 0 and at + len(mark) < len(text)]
        if places:
            return min(places, key=lambda at: abs(at - exact))
    return exact


def _groups(text: Text) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group the copies of each text.

    Returns the numbers of the documents ordered by the hash of their text, (N,), the group of each
    in that order, (N,), and the bytes of each group.
    """
    hashes, sizes = text.survey.hashes, text.survey.sizes
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    differs = np.any(hashes[order][1:] != hashes[order][:-1], axis=1)
    starts = np.flatnonzero(np.concatenate([[True], differs]))
    if len(starts) == 1:
        raise UsageError(
            f"{text.source.description}: all {len(sizes)} documents are the same text; "
            f"give it once, or pass {parameter('val_fraction')} 0"
        )
    group_of = np.concatenate([[0], np.cumsum(differs)])
    return order, group_of, np.add.reduceat(sizes[order], starts)


def _chosen(group_sizes: np.ndarray, among: np.ndarray, fraction: float) -> list[int]:
    """Return the groups to hold out.

    They have at least `fraction` of the bytes, unless the other groups are too large.

    group_sizes: bytes of each group
    among: numbers of the groups to choose from, in the order of their hash
    fraction: share of the bytes of these groups
    """
    total = int(group_sizes[among].sum())
    chosen, taken = [], 0
    for group in among.tolist():
        if taken >= fraction * total:
            break
        if taken + int(group_sizes[group]) <= _most(fraction, total):
            chosen.append(group)
            taken += int(group_sizes[group])
    return chosen


def _most(fraction: float, total: int) -> float:
    """Return the largest number of bytes to hold out as whole documents for a `fraction`."""
    return min(2 * fraction, (1 + fraction) / 2) * total
