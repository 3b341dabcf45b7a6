"""Entry of the activation of the MLP. geglu and relu2 share its kernels and are not measured."""

from minillm.profiling.catalogue.entry import BACKWARD, FORWARD, TOKENS, Data, Entry


def _data(s, draw, device) -> Data:
    return Data({"x": draw(s["N"], 2 * s["F"])}, {}, [draw(s["N"], s["F"])])


def _cost(s, item, direction):
    n, back = s["N"] * s["F"], direction == BACKWARD
    return (10 if back else 5) * n, (5 if back else 3) * n * item


def _tile_sizes(size, words):
    F = min(size, 5632)
    return {"N": (1 << 26) // F, "F": F}


SWIGLU = Entry(
    gpu=[{"N": TOKENS, "F": 5632}],
    cpu=[{"N": 2048, "F": 704}],
    small={"N": 19, "F": 200},
    data=_data,
    cost=_cost,
    directions=(FORWARD, BACKWARD),
    tile_sizes=_tile_sizes,
)
