"""What is measured: the problems of each operation, their data, their useful FLOPs and bytes.

Counted are the FLOPs that the maths needs (of attention the pairs seen, its backward pass 2.5 times
its forward; of a symmetric product one half) and the bytes that must move if each large input is
read and each large output written once; of decoding, the keys and values. Both ways of attention
are the sum of either, as the backward pass reads again what the forward pass has read. What an
implementation does beyond that is its own loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from minillm.model.positions import rope_tables
from minillm.runtime.ceilings import DTYPES

FORWARD, BACKWARD = "forward", "backward"
# Where the gradients are made in the forward pass, the two cannot be told apart.
BOTH = "forward+backward"
STEPS = 5  # of Newton-Schulz
NORMS = ("w_post", "w_pre")


@dataclass(frozen=True)
class Problem:
    """One operation at one size: sizes as {"N": 16384, "C": 2048}, dtype "fp32", "fp16", "bf16".

    Of attention some sizes may be missing: "G", H if so; "W", the window; "docs", the documents in
    each row, see `document_lengths`; "cap", the soft-cap.
    """

    op: str
    sizes: dict[str, int]
    dtype: str

    @property
    def shape(self) -> str:
        """The sizes in words: N16384 C2048."""
        return " ".join(f"{letter}{size}" for letter, size in self.sizes.items())

    @property
    def directions(self) -> tuple[str, ...]:
        """What is timed of it, each by itself."""
        return DIRECTIONS.get(self.op, (FORWARD,))

    def cost(self, direction: str) -> tuple[float, float]:
        """Useful FLOPs, and bytes that must move."""
        return COSTS[self.op](self.sizes, DTYPES[self.dtype].itemsize, direction)

    def data(self, device: torch.device, seed: int = 0) -> "Data":
        """Random data, the same for each seed on one kind of device."""
        numbers = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, dtype: str = "", scale: float = 1.0, shift: float = 0.0) -> Tensor:
            x = torch.randn(shape, generator=numbers, device=device) * scale + shift
            return x.to(DTYPES[dtype or self.dtype])

        return DATA[self.op](self.sizes, draw, device)


@dataclass
class Data:
    """The arguments of an operation: tensors that want a gradient, and the others.

    dy: a gradient for each output, where there are leaves.
    part: of tensors, results and gradients alike, what the truth is computed for where all of it
    would take too much memory in fp64; it must not depend on the rest.
    """

    leaves: dict[str, Any]
    others: dict[str, Any]
    dy: list[Tensor] = field(default_factory=list)
    part: Callable[[Tensor], Tensor] = lambda x: x


DIRECTIONS = {
    "attention": (FORWARD, BACKWARD, BOTH),
    "rms_norm": (FORWARD, BACKWARD),
    "add_rms_norm": (FORWARD, BACKWARD),
    "sandwich_norm": (FORWARD, BACKWARD),
    "rope": (FORWARD, BACKWARD),
    "swiglu": (FORWARD, BACKWARD),
    "linear_cross_entropy": (FORWARD, BOTH),
}


def document_lengths(T: int, n: int) -> list[int]:
    """Of n documents that fill a row of T tokens, the lengths: as 1 to 2 to 3 ... to n."""
    ends = [T * i * (i + 1) // (n * (n + 1)) for i in range(n + 1)]
    return [end - start for start, end in pairwise(ends)]


def _attention(s, draw, device) -> Data:
    B, T, H, G = s["B"], s["T"], s["H"], s.get("G", s["H"])
    q, k, v, dy = (draw(B, T, heads, s["D"]) for heads in (H, G, G, H))
    options = {name: s[size] for name, size in (("window", "W"), ("softcap", "cap")) if size in s}
    if "docs" in s:
        lengths = torch.tensor(document_lengths(T, s["docs"]), device=device)
        options["documents"] = torch.arange(s["docs"], device=device).repeat_interleave(lengths)
        options["documents"] = options["documents"].repeat(B, 1)  # (B, T)

    def part(x: Tensor) -> Tensor:
        """Of the first row the first key head, and the query heads that share it."""
        return x[:1, :, : x.shape[2] // G] if x.dim() == 4 else x[:1]

    return Data({"q": q, "k": k, "v": v}, options, [dy], part)


def _decode_attention(s, draw, device) -> Data:
    B, S, G, D = s["B"], s["S"], s["G"], s["D"]
    q, k, v = draw(B, 1, s["H"], D), draw(B, S, G, D), draw(B, S, G, D)
    return Data({}, {"q": q, "k": k, "v": v})


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


def _rope(s, draw, device) -> Data:
    q, k, *dy = (draw(s["B"], s["T"], s[heads], s["D"]) for heads in "HGHG")
    tables = (t.to(device) for t in rope_tables(s["T"], s["D"], 10000.0))  # fp32, as the model's
    return Data({"q": q, "k": k}, dict(zip(("cos", "sin"), tables, strict=True)), dy)


def _swiglu(s, draw, device) -> Data:
    return Data({"x": draw(s["N"], 2 * s["F"])}, {}, [draw(s["N"], s["F"])])


def _linear_cross_entropy(s, draw, device) -> Data:
    x, w = draw(s["N"], s["C"]), draw(s["V"], s["C"], scale=s["C"] ** -0.5)
    targets = (draw(s["N"], dtype="fp32").abs() * s["V"] / 4).long().clamp(max=s["V"] - 1)
    one = torch.ones((), device=device)
    return Data({"x": x, "w": w}, {"targets": targets}, [one])


def _adamw(s, draw, device) -> Data:
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


def _newton_schulz(s, draw, device) -> Data:
    return Data({}, {"g": draw(s["B"], s["M"], s["N"]), "steps": STEPS})


def _sample(s, draw, device) -> Data:
    logits, u = draw(s["B"], s["V"], scale=3.0), draw(s["B"], dtype="fp32").abs().frac()
    return Data(
        {}, {"logits": logits, "uniform": u, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
    )


DATA: dict[str, Callable] = {
    "attention": _attention,
    "decode_attention": _decode_attention,
    "rms_norm": _norm,
    "add_rms_norm": _add_norm,
    "sandwich_norm": _sandwich_norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "linear_cross_entropy": _linear_cross_entropy,
    "adamw": _adamw,
    "newton_schulz": _newton_schulz,
    "sample": _sample,
}


def _rows(s, numbers: tuple[int, int], flops: tuple[int, int], item: int, direction: str):
    """An operation on N rows of C: so many numbers moved, and FLOPs, for each of N C."""
    back = direction == BACKWARD
    return flops[back] * s["N"] * s["C"], numbers[back] * s["N"] * s["C"] * item


def _attention_cost(s, item, direction):
    pairs = 0.0  # of a query and a key that it sees; with its own key it makes half a pair
    for n in document_lengths(s["T"], s.get("docs", 1)):
        window = min(n, s.get("W", n))
        pairs += n * (window - 0.5) - window * (window - 1) / 2
    # Tensors of H and of G heads each: forward q y and k v; backward these and their gradients.
    times, tensors = {FORWARD: (1, 2), BACKWARD: (2.5, 4), BOTH: (3.5, 6)}[direction]
    numbers = s["B"] * s["T"] * (s["H"] + s.get("G", s["H"])) * s["D"]
    return times * 4 * s["B"] * s["H"] * s["D"] * pairs, tensors * numbers * item


def _rope_cost(s, item, direction):
    n = s["B"] * s["T"] * (s["H"] + s["G"]) * s["D"]
    return 3 * n, 2 * n * item


def _swiglu_cost(s, item, direction):
    n, back = s["N"] * s["F"], direction == BACKWARD
    return (10 if back else 5) * n, (5 if back else 3) * n * item


def _linear_cross_entropy_cost(s, item, direction):
    both = direction == BOTH
    weights = (s["N"] + s["V"]) * s["C"] * item
    return (6 if both else 2) * s["N"] * s["C"] * s["V"], (2 if both else 1) * weights


def _adamw_cost(s, item, direction):
    n = s["L"] * (12 * s["C"] ** 2 + 2 * s["C"])
    return 12 * n, n * (6 * 4 + item)


def _newton_schulz_cost(s, item, direction):
    short, long = sorted((s["M"], s["N"]))
    # X X^T and A A are symmetric, which halves them; B X is not.
    step = short**2 * long + short**3 + 2 * short**2 * long
    return STEPS * s["B"] * step, 2 * s["B"] * s["M"] * s["N"] * item


COSTS: dict[str, Callable] = {
    "attention": _attention_cost,
    "decode_attention": lambda s, item, _: (
        4 * s["B"] * s["H"] * s["S"] * s["D"],
        2 * s["B"] * s["S"] * s["G"] * s["D"] * item,
    ),
    "rms_norm": lambda s, item, d: _rows(s, (2, 3), (4, 8), item, d),
    "add_rms_norm": lambda s, item, d: _rows(s, (4, 4), (5, 9), item, d),
    "sandwich_norm": lambda s, item, d: _rows(s, (4, 5), (9, 17), item, d),
    "rope": _rope_cost,
    "swiglu": _swiglu_cost,
    "linear_cross_entropy": _linear_cross_entropy_cost,
    "adamw": _adamw_cost,
    "newton_schulz": _newton_schulz_cost,
    "sample": lambda s, item, _: (5 * s["B"] * s["V"], s["B"] * s["V"] * item),
}
