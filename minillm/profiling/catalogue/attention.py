"""Entries of attention and of attention over a cache.

Attention may leave out some sizes: "G" (then it is H), "W", the window, "docs", the documents in
each row, see `document_lengths`, and "cap", the soft-cap.
"""

from itertools import pairwise

import torch
from torch import Tensor

from minillm.profiling.catalogue.entry import (
    BACKWARD,
    BOTH,
    FORWARD,
    TOKENS,
    WIDTH,
    Data,
    Entry,
    Sizes,
)


def document_lengths(T: int, n: int) -> list[int]:
    """Return the lengths of n documents that fill a row of T tokens, as 1 to 2 to 3 ... to n.

    T: number of tokens in the row
    n: number of documents
    """
    ends = [T * i * (i + 1) // (n * (n + 1)) for i in range(n + 1)]
    return [end - start for start, end in pairwise(ends)]


def _sizes_on_gpu() -> list[Sizes]:
    """Return {D64, D128} x {1k ... 16k} at equal tokens and width, and four with an option each.

    The options are four queries to a key, a window, packed documents and a soft-cap.
    """
    lengths = [1024 << i for i in range(5)]
    shapes = [(T, D) for D in (64, 128) for T in lengths]
    plain = [{"B": TOKENS // T, "T": T, "H": WIDTH // D, "D": D} for T, D in shapes]
    some, long = ({"B": TOKENS // T, "T": T, "H": 16, "D": 128} for T in (4096, TOKENS))
    return [*plain, {**some, "G": 4}, {**long, "W": 1024}, {**long, "docs": 8}, {**some, "cap": 30}]


def _data(s, draw, device) -> Data:
    B, T, H, G = s["B"], s["T"], s["H"], s.get("G", s["H"])
    q, k, v, dy = (draw(B, T, heads, s["D"]) for heads in (H, G, G, H))
    options = {name: s[size] for name, size in (("window", "W"), ("softcap", "cap")) if size in s}
    if "docs" in s:
        lengths = torch.tensor(document_lengths(T, s["docs"]), device=device)
        options["documents"] = torch.arange(s["docs"], device=device).repeat_interleave(lengths)
        options["documents"] = options["documents"].repeat(B, 1)  # (B, T)

    def part(x: Tensor) -> Tensor:
        """Return the first key head of the first row, or the query heads that share it."""
        return x[:1, :, : x.shape[2] // G] if x.dim() == 4 else x[:1]

    return Data({"q": q, "k": k, "v": v}, options, [dy], part)


def _cost(s, item, direction):
    """Count the pairs seen. The backward pass takes 2.5 times the FLOPs of the forward pass.

    Forward and backward together move the sum of both, as the backward pass reads again what the
    forward pass has read.
    """
    pairs = 0.0  # pairs of a query and a key that it sees; on the diagonal half a pair
    for n in document_lengths(s["T"], s.get("docs", 1)):
        window = min(n, s.get("W", n))
        pairs += n * (window - 0.5) - window * (window - 1) / 2
    # Tensors of H and of G heads each: forward q y and k v; backward these and their gradients.
    times, tensors = {FORWARD: (1, 2), BACKWARD: (2.5, 4), BOTH: (3.5, 6)}[direction]
    numbers = s["B"] * s["T"] * (s["H"] + s.get("G", s["H"])) * s["D"]
    return times * 4 * s["B"] * s["H"] * s["D"] * pairs, tensors * numbers * item


def _tile_sizes(size, words):
    T = 1024 if "fp32" in words else 4096
    return {"B": 16384 // T, "T": T, "H": 2048 // size, "D": size}


ATTENTION = Entry(
    gpu=_sizes_on_gpu(),
    cpu=[
        {"B": 8, "T": 256, "H": 2, "D": 64},
        {"B": 2, "T": 1024, "H": 2, "D": 64},
        {"B": 2, "T": 1024, "H": 1, "D": 128},
    ],
    small={"B": 1, "T": 77, "H": 2, "D": 64},
    data=_data,
    cost=_cost,
    directions=(FORWARD, BACKWARD, BOTH),
    tile_sizes=_tile_sizes,
)


def _decode_data(s, draw, device) -> Data:
    B, S, G, D = s["B"], s["S"], s["G"], s["D"]
    q, k, v = draw(B, 1, s["H"], D), draw(B, S, G, D), draw(B, S, G, D)
    return Data({}, {"q": q, "k": k, "v": v})


def _decode_cost(s, item, direction):
    """Count the bytes of keys and values alone: the queries are few."""
    flops = 4 * s["B"] * s["H"] * s["S"] * s["D"]
    return flops, 2 * s["B"] * s["S"] * s["G"] * s["D"] * item


def _decode_tile_sizes(size, words):
    if "combine" in words:  # it takes too little time to matter
        return None
    heads = 32 if "many" in words else 4
    return {"B": 16, "S": 8192, "H": 4 * heads, "G": 4, "D": size}


DECODE_ATTENTION = Entry(
    gpu=[
        {"B": 1, "S": 16384, "H": 16, "G": 16, "D": 128},
        {"B": 16, "S": 8192, "H": 32, "G": 8, "D": 128},
        {"B": 64, "S": 2048, "H": 16, "G": 16, "D": 64},
    ],
    cpu=[{"B": 4, "S": 1024, "H": 4, "G": 2, "D": 64}],
    small={"B": 2, "S": 77, "H": 2, "G": 1, "D": 64},
    data=_decode_data,
    cost=_decode_cost,
    tile_sizes=_decode_tile_sizes,
)
