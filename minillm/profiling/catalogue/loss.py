"""Entry of the output layer and its cross-entropy."""

import torch

from minillm.profiling.catalogue.entry import BOTH, FORWARD, TOKENS, WIDTH, Data, Entry


def _data(s, draw, device) -> Data:
    x, w = draw(s["N"], s["C"]), draw(s["V"], s["C"], scale=s["C"] ** -0.5)
    targets = (draw(s["N"], dtype="fp32").abs() * s["V"] / 4).long().clamp(max=s["V"] - 1)
    one = torch.ones((), device=device)
    return Data({"x": x, "w": w}, {"targets": targets}, [one])


def _cost(s, item, direction):
    both = direction == BOTH
    weights = (s["N"] + s["V"]) * s["C"] * item
    return (6 if both else 2) * s["N"] * s["C"] * s["V"], (2 if both else 1) * weights


def _tile_sizes(size, words):
    # Few columns, so that the time is not that of the matrix products.
    return {"N": 8192, "C": 64, "V": min(size, 50304)}


LINEAR_CROSS_ENTROPY = Entry(
    gpu=[{"N": TOKENS, "C": WIDTH, "V": V} for V in (50304, 32768)],
    cpu=[{"N": 1024, "C": 128, "V": 4096}],
    small={"N": 37, "C": 48, "V": 301},
    data=_data,
    cost=_cost,
    directions=(FORWARD, BOTH),
    tile_sizes=_tile_sizes,
)
