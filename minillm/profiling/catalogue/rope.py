"""Entry of the rotary position embedding."""

from minillm.model.positions import rope_tables
from minillm.profiling.catalogue.entry import BACKWARD, FORWARD, Data, Entry


def _data(s, draw, device) -> Data:
    q, k, *dy = (draw(s["B"], s["T"], s[heads], s["D"]) for heads in "HGHG")
    tables = (t.to(device) for t in rope_tables(s["T"], s["D"], 10000.0))  # fp32, as in a model
    return Data({"q": q, "k": k}, dict(zip(("cos", "sin"), tables, strict=True)), dy)


def _cost(s, item, direction):
    n = s["B"] * s["T"] * (s["H"] + s["G"]) * s["D"]
    return 3 * n, 2 * n * item


def _tile_sizes(size, words):
    return {"B": 8, "T": 2048, "H": 2048 // size, "G": 2048 // size, "D": size}


ROPE = Entry(
    gpu=[{"B": 8, "T": 2048, "H": 16, "G": 16, "D": 128}],
    cpu=[{"B": 8, "T": 256, "H": 4, "G": 4, "D": 64}],
    small={"B": 1, "T": 19, "H": 3, "G": 1, "D": 64},
    data=_data,
    cost=_cost,
    directions=(FORWARD, BACKWARD),
    tile_sizes=_tile_sizes,
)
