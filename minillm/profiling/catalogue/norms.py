"""Entries of the norms."""

from minillm.profiling.catalogue.entry import BACKWARD, FORWARD, TOKENS, WIDTH, Data, Entry

NORMS = ("w_post", "w_pre")  # weights of sandwich_norm


def _norm(s, draw, device) -> Data:
    x, w = draw(s["N"], s["C"]), draw(s["C"], dtype="fp32", scale=0.1, shift=1.0)
    return Data({"x": x, "w": w}, {}, [draw(s["N"], s["C"])])


def _add_norm(s, draw, device) -> Data:
    x, residual, *dy = (draw(s["N"], s["C"]) for _ in range(4))
    w = draw(s["C"], dtype="fp32", scale=0.1, shift=1.0)
    return Data({"x": x, "residual": residual, "w": w}, {}, dy)


def _sandwich_norm(s, draw, device) -> Data:
    data = _add_norm(s, draw, device)
    weights = {name: draw(s["C"], dtype="fp32", scale=0.1, shift=1.0) for name in NORMS}
    rows = {name: x for name, x in data.leaves.items() if name != "w"}
    return Data({**rows, **weights}, {}, data.dy)


def _entry(data, numbers: tuple[int, int], flops: tuple[int, int]) -> Entry:
    """Return the entry of a norm of N rows of C.

    numbers, flops: numbers moved and FLOPs per element, forward and backward
    """

    def cost(s, item, direction):
        back = direction == BACKWARD
        return flops[back] * s["N"] * s["C"], numbers[back] * s["N"] * s["C"] * item

    return Entry(
        gpu=[{"N": TOKENS, "C": WIDTH}],
        cpu=[{"N": 4096, "C": 256}],
        small={"N": 37, "C": 200},
        data=data,
        cost=cost,
        directions=(FORWARD, BACKWARD),
        tile_sizes=lambda size, words: {"N": (1 << 25) // size, "C": size},
    )


RMS_NORM = _entry(_norm, (2, 3), (4, 8))
ADD_RMS_NORM = _entry(_add_norm, (4, 4), (5, 9))
SANDWICH_NORM = _entry(_sandwich_norm, (4, 5), (9, 17))
