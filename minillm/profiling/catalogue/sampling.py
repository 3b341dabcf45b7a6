"""Entry of the sampler."""

from minillm.profiling.catalogue.entry import Data, Entry


def _data(s, draw, device) -> Data:
    logits, u = draw(s["B"], s["V"], scale=3.0), draw(s["B"], dtype="fp32").abs().frac()
    return Data(
        {}, {"logits": logits, "uniform": u, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
    )


def _cost(s, item, direction):
    return 5 * s["B"] * s["V"], s["B"] * s["V"] * item


def _tile_sizes(size, words):
    return {"B": 64, "V": min(size, 50304)} if "sample" in words else None


SAMPLE = Entry(
    gpu=[{"B": 64, "V": 50304}],
    cpu=[{"B": 8, "V": 50304}],
    small={"B": 3, "V": 301},
    data=_data,
    cost=_cost,
    dtype="fp32",  # every caller has fp32 logits
    tile_sizes=_tile_sizes,
)
