"""Place parameters in flat buffers that are cut into equal chunks, one chunk for each rank.

    flat     [ a a a a . b b b b b b b . c c c | c c c c c c . d d . . . . . . . ]
              `-------- chunk of rank 0 -------' `-------- chunk of rank 1 -----'

The dots are padding to a multiple of ALIGN elements. The padding is zero and stays zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass

ALIGN = 64  # elements: every parameter and every chunk begins on a cache line, in any dtype
UNEVEN = 1.25  # a bucket of whole matrices grows while its padding is more than a quarter

Sizes = dict[str, int]  # number of elements of each parameter by name, in order of their gradients


@dataclass(frozen=True)
class Layout:
    """The places of parameters in a flat buffer.

    offsets: the element at which each parameter begins, by name
    chunk: number of elements in the chunk of a rank
    """

    offsets: Sizes
    chunk: int


def in_a_row(sizes: Sizes, ranks: int) -> Layout:
    """Return the layout of parameters one after another, which chunks may cut.

    sizes: number of elements of each parameter, in order of their gradients
    ranks: number of ranks, which is the number of chunks
    """
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += _aligned(size)
    return Layout(offsets, _aligned(-(-end // ranks)))


def by_owner(sizes: Sizes, ranks: int) -> Layout:
    """Return a layout in which each parameter lies whole in one chunk.

    The largest parameter is placed first, each in the chunk that is filled least so far. All chunks
    are as long as the longest: with fewer parameters than ranks, the buffer is mostly padding.

    sizes: number of elements of each parameter, in order of their gradients
    ranks: number of ranks, which is the number of chunks
    """
    filled, places = [0] * ranks, {}
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        rank = filled.index(min(filled))
        places[name] = rank, filled[rank]
        filled[rank] += _aligned(sizes[name])
    chunk = max(filled)
    return Layout({name: places[name][0] * chunk + places[name][1] for name in sizes}, chunk)


def _aligned(size: int) -> int:
    # An empty parameter takes ALIGN elements too, so that it lies in some rank's chunk.
    return max(1, -(-size // ALIGN)) * ALIGN


def cut(sizes: Sizes, ranks: int, limit: int, whole: bool) -> Iterator[Layout]:
    """Yield the layouts of buckets of at most `limit` elements, or of one parameter that has more.

    sizes: number of elements of each parameter, in order of their gradients
    ranks: number of ranks, which is the number of chunks
    limit: largest number of elements in a bucket
    whole: put every parameter into one chunk. Such a bucket grows past the limit until its chunks
        are filled about evenly, or no parameters are left.
    """
    arrange = by_owner if whole else in_a_row
    members: Sizes = {}
    for name, size in sizes.items():
        total = sum(map(_aligned, members.values()))
        if members and total + size > limit:
            layout = arrange(members, ranks)
            if not whole or layout.chunk * ranks <= UNEVEN * total:
                yield layout
                members = {}
        members[name] = size
    if members:
        yield arrange(members, ranks)
