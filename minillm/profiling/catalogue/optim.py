"""Entries of the operations of optimizers."""

from minillm.profiling.catalogue.entry import Data, Entry

STEPS = 5  # iterations of Newton-Schulz


def _adamw_data(s, draw, device) -> Data:
    C = s["C"]
    shapes = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (C,), (C,)] * s["L"]
    n = len(shapes)
    return Data({}, {
        "params": [draw(*shape, dtype="fp32", scale=0.02) for shape in shapes],
        "grads": [draw(*shape) for shape in shapes],
        "exp_avgs": [draw(*shape, dtype="fp32") for shape in shapes],
        "exp_avg_sqs": [draw(*shape, dtype="fp32").square() for shape in shapes],
        "step": 10, "lr": [1e-3] * n, "weight_decay": [0.1] * n,
    })  # fmt: skip


def _adamw_cost(s, item, direction):
    n = s["L"] * (12 * s["C"] ** 2 + 2 * s["C"])
    return 12 * n, n * (6 * 4 + item)


ADAMW = Entry(
    gpu=[{"L": 12, "C": 768}],
    cpu=[{"L": 2, "C": 256}],
    small={"L": 1, "C": 40},
    data=_adamw_data,
    cost=_adamw_cost,
    tile_sizes=lambda size, words: {"L": 12, "C": 768},
)


def _newton_schulz_data(s, draw, device) -> Data:
    return Data({}, {"g": draw(s["B"], s["M"], s["N"]), "steps": STEPS})


def _newton_schulz_cost(s, item, direction):
    short, long = sorted((s["M"], s["N"]))
    # X X^T and A A are symmetric, which halves them; B X is not.
    step = short**2 * long + short**3 + 2 * short**2 * long
    return STEPS * s["B"] * step, 2 * s["B"] * s["M"] * s["N"] * item


def _newton_schulz_tile_sizes(size, words):
    M = min(size, 2048)
    return {"B": 4, "M": M, "N": M}


NEWTON_SCHULZ = Entry(
    gpu=[{"B": 12, "M": 768, "N": 3072}, {"B": 4, "M": 2048, "N": 2048}],
    cpu=[{"B": 4, "M": 128, "N": 512}],
    small={"B": 2, "M": 40, "N": 72},
    data=_newton_schulz_data,
    cost=_newton_schulz_cost,
    tile_sizes=_newton_schulz_tile_sizes,
)
