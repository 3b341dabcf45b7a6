"""Which text is for training and which is held out, decided by content and settings alone.

Documents are ordered by the hash of their text and held out from the start of that order until
their share of all bytes is reached. So the split does not depend on names or order, and copies of a
text fall on one side. Where documents are too few or too unequal for that, each large one gives its
tail instead. Validation text that is named by itself is held out whole. This module does not
tokenize.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillm.data.survey import Text, fingerprint, survey
from minillm.errors import UsageError
from minillm.runtime.terminal import decoded

__all__ = ["Part", "Split", "Text", "held_out_names", "parts", "split", "survey"]

SIDES = ("train", "val")
TRAIN, VAL, NEITHER = 0, 1, 2
# Where a tail may begin, the best first.
BOUNDARIES = ("\n\n", "\n", ". ", " ")


@dataclass(frozen=True)
class Split:
    """Where each document goes.

    side: (N,) int8, TRAIN, VAL or NEITHER.
    cuts: for each document that is cut its number and where, in characters.
    bytes, documents: of each side, under "train" and "val".
    rule: "documents", "tails" or "given".
    """

    side: np.ndarray
    cuts: dict[int, int]
    bytes: dict[str, int]
    documents: dict[str, int]
    rule: str = "documents"


class Part(NamedTuple):
    """A text for one side, "train" or "val", and what to call it."""

    side: str
    text: str
    name: str


def split(text: Text, fraction: float, whole: bool = False) -> Split:
    """Hold out `fraction` (0 to 0.5) of the bytes of `text`, or its validation text.

    A document that would take the held-out share above twice the fraction is passed over. Where the
    others do not reach the fraction, each of the large ones gives its tail. With a fraction above 0
    both sides get text. A single document is cut after int(n_characters * (1 - fraction))
    characters, as nanoGPT does with 0.1.

    whole: hold out whole documents in any case, as releases did for which runs state no rule.
    """
    if not 0 <= fraction <= 0.5:
        raise UsageError(f"--val-fraction {fraction}: expected 0 (nothing held out) to 0.5")
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
    """Stream the text of both sides in reading order; UsageError if a document has changed."""
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
        raise UsageError(f"{text.source.description}: lost a document while it was being read")


def held_out_names(text: Text, plan: Split, limit: int) -> tuple[str, ...]:
    """Return the names of the first `limit` documents that are held out, in reading order.

    Reads as many documents as it takes to come to them.
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
    """Return the split in which no document is cut."""
    on = {name: side == number for number, name in enumerate(SIDES)}
    return Split(
        side,
        {},
        bytes={name: int(text.survey.sizes[mask].sum()) for name, mask in on.items()},
        documents={name: int(mask.sum()) for name, mask in on.items()},
        rule=rule,
    )


def _split_given(text: Text) -> Split:
    """Hold out the validation text; leave what is the same text out of training."""
    found = text.survey
    first = len(found.sizes) - found.n_given
    held = {row.tobytes() for row in found.hashes[first:]}
    side = np.full(len(found.sizes), VAL, np.int8)
    for number in range(first):
        side[number] = NEITHER if found.hashes[number].tobytes() in held else TRAIN
    if not (side == TRAIN).any():
        raise UsageError(
            f"--val {text.validation.description}: holds all the text of --data; "
            "nothing is left to train on"
        )
    return _split_whole(text, side, "given")


def _split_single(text: Text, fraction: float) -> Split:
    cut = int(text.survey.n_characters * (1 - fraction))
    if not 0 < cut < text.survey.n_characters:
        raise UsageError(
            f"{text.source.description}: {text.survey.n_characters} characters are too few to hold "
            f"out {fraction:g} of them; give more text or --val-fraction 0"
        )
    return _with_cuts(text, np.zeros(1, np.int8), {0: cut}, "documents")


def _split_tails(
    text: Text, fraction: float, groups: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> Split:
    """Cut the tail of each document that is too large to be held out whole.

    The small ones are held out whole in the same proportion, as far as that is possible.
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
    """Return the split with these cuts; its bytes are counted by reading the text."""
    sizes, counts = {"train": 0, "val": 0}, {"train": 0, "val": 0}
    for part in parts(text, Split(side, cuts, {}, {})):
        sizes[part.side] += len(part.text.encode("utf-8"))
        counts[part.side] += 1
    return Split(side, cuts, sizes, counts, rule)


def _tail_start(text: str, fraction: float) -> int:
    """Return where the last `fraction` of a text begins: behind a paragraph, a line, a sentence or
    a word, if one ends within half the tail's length of the exact place. 0: it cannot be cut.
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

    Returns the documents by the hash of their text, (N,), the group of each in that order, (N,),
    and the bytes of each group.
    """
    hashes, sizes = text.survey.hashes, text.survey.sizes
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    differs = np.any(hashes[order][1:] != hashes[order][:-1], axis=1)
    starts = np.flatnonzero(np.concatenate([[True], differs]))
    if len(starts) == 1:
        raise UsageError(
            f"{text.source.description}: all {len(sizes)} documents are the same text; "
            "give it once, or pass --val-fraction 0"
        )
    group_of = np.concatenate([[0], np.cumsum(differs)])
    return order, group_of, np.add.reduceat(sizes[order], starts)


def _chosen(group_sizes: np.ndarray, among: np.ndarray, fraction: float) -> list[int]:
    """Return the groups that are held out of those `among`, which are in the order of their hash.

    They hold at least `fraction` of the bytes, unless the others are too large.
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
    """Return the most bytes that whole documents may take for a `fraction` of `total`."""
    return min(2 * fraction, (1 + fraction) / 2) * total
