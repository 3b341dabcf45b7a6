"""List the cases of the part `correctness`: every operation at several shapes and options.

The data come from the profiler's catalogue. CHANGES turns them into the data of options that are
tensors, and of the operations that have no entry there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from minillm.ops import OPERATIONS
from minillm.profiling.catalogue.entry import Data
from minillm.profiling.catalogue.problem import Problem, problem_at, small_problem

# Operations without an entry, and those whose data they are given.
RELATIVES = {"geglu": "swiglu", "relu2": "swiglu", "rope_cache": "rope", "uniform": "sample"}
NEW_TOKENS = 2  # tokens that rope_cache writes in each row
LOGITS_OF_A_CHUNK = 1 << 27  # linear_cross_entropy takes rows in chunks of that many logits


@dataclass(frozen=True)
class Case:
    """One call of an operation, at one size in one dtype.

    options: further arguments that are numbers
    change: name of the change of the data in CHANGES, or ""
    """

    op: str
    sizes: dict[str, int]
    dtype: str
    options: dict[str, float] = field(default_factory=dict)
    change: str = ""

    @property
    def problem(self) -> Problem:
        """The problem of the catalogue that has the data."""
        return problem_at(RELATIVES.get(self.op, self.op), self.sizes, self.dtype)

    def data(self, device: torch.device) -> Data:
        """Return the arguments of the call. All of the result is compared, not a part of it."""
        found = self.problem.data(device)
        for name in (self.op, self.change):
            found = CHANGES.get(name, lambda data: data)(found)
        return replace(found, others={**found.others, **self.options}, part=lambda x: x)

    @property
    def words(self) -> str:
        """The options, in words."""
        numbers = [f"{name}={value}" for name, value in self.options.items()]
        return " ".join([*numbers, self.change.replace("_", " ")]).strip()


def small_cases() -> list[Case]:
    """Return one case for each operation that the interpreter solves in about a second."""
    found = []
    for op in OPERATIONS:
        problem = small_problem(RELATIVES.get(op, op), "fp32")
        found.append(Case(op, problem.sizes, problem.dtype))
    return found


def all_cases() -> list[Case]:
    """Return the cases for a GPU. Neighbours share kernels as little as possible.

    Workers take every n-th case and begin with the first, so that each compiles other kernels.
    """
    groups = [
        attention_cases(), rope_cases(), norm_cases(), loss_cases(), decode_cases(), mlp_cases(),
        optimizer_cases(), sampling_cases(),
    ]  # fmt: skip
    longest = max(map(len, groups))
    return [group[n] for n in range(longest) for group in groups if n < len(group)]


def attention_cases() -> list[Case]:
    """Return whole and ragged tiles, grouped heads, and every option, at both usual widths."""
    op, found = "attention", []
    for D in (64, 128):
        tiles = {"B": 2, "T": 1024, "H": 4, "D": D}
        ragged = {"B": 2, "T": 333, "H": 4, "D": D}
        found += [
            Case(op, tiles, "bf16"),
            Case(op, {**tiles, "G": 1}, "bf16"),
            Case(op, {**ragged, "W": 100}, "bf16"),
            Case(op, {**ragged, "docs": 3}, "bf16"),
            Case(op, {**ragged, "docs": 3, "W": 50, "G": 2}, "bf16"),
            Case(op, {**ragged, "cap": 30}, "bf16"),
            Case(op, ragged, "bf16", {}, "alibi"),
            Case(op, tiles, "fp16"),
            Case(op, {**ragged, "G": 2}, "fp32"),
        ]
        found += [
            Case(op, {"B": 1, "T": T, "H": 2, "G": 1, "D": D}, "bf16") for T in (2, 77, 129, 1000)
        ]
    narrow = ({"B": 1, "T": 200, "H": 2, "D": D} for D in (32, 80, 96))
    return found + [Case(op, sizes, dtype) for sizes in narrow for dtype in ("bf16", "fp32")]


def decode_cases() -> list[Case]:
    """Return few and many rows, rows of different lengths, and the options."""
    op, found = "decode_attention", []
    grouped = {"B": 2, "S": 1000, "H": 8, "G": 2, "D": 128}
    single = {"B": 3, "S": 77, "H": 12, "G": 12, "D": 64}
    long = {"B": 16, "S": 8192, "H": 32, "G": 8, "D": 128}
    for dtype in ("bf16", "fp16", "fp32"):
        found += [Case(op, sizes, dtype) for sizes in (grouped, single)]
    found += [Case(op, long, "bf16"), Case(op, grouped, "bf16", {}, "lengths")]
    found += [Case(op, single, "bf16", {"window": 20}, "lengths")]
    return [*found, Case(op, grouped, "bf16", {"softcap": 30.0}, "lengths")]


def norm_cases() -> list[Case]:
    """Return the three norms at short, usual and the longest rows."""
    shapes = [(1000, 768), (37, 200), (300, 4096), (64, 16384), (1, 768)]
    return [
        Case(op, {"N": N, "C": C}, dtype)
        for N, C in shapes
        for op in ("rms_norm", "add_rms_norm", "sandwich_norm")
        for dtype in ("bf16", "fp16", "fp32")
    ]


def rope_cases() -> list[Case]:
    """Return rope and rope_cache, with and without QK-norm."""
    shapes = [(2, 300, 12, 4, 64), (1, 77, 4, 1, 128), (4, 33, 3, 3, 32)]
    return [
        Case(op, dict(zip("BTHGD", shape, strict=True)), dtype, {}, change)
        for shape in shapes
        for op in ("rope", "rope_cache")
        for change in ("", "qk_norm")
        for dtype in ("bf16", "fp16", "fp32")
    ]


def mlp_cases() -> list[Case]:
    """Return the three activations."""
    return [
        Case(op, {"N": N, "F": F}, dtype)
        for N, F in ((999, 2048), (19, 200), (64, 5632))
        for op in ("swiglu", "geglu", "relu2")
        for dtype in ("bf16", "fp16", "fp32")
    ]


def loss_cases() -> list[Case]:
    """Return odd vocabularies, the options, ignored targets, and rows for two chunks."""
    op = "linear_cross_entropy"
    odd, small = {"N": 300, "C": 256, "V": 50257}, {"N": 100, "C": 64, "V": 1001}
    chunks = {"N": LOGITS_OF_A_CHUNK // 50304 + 100, "C": 128, "V": 50304}
    found = [Case(op, sizes, dtype) for sizes in (odd, small) for dtype in ("bf16", "fp16", "fp32")]
    found += [Case(op, chunks, "bf16"), Case(op, {**odd, "V": 131072}, "bf16")]
    found += [Case(op, odd, "bf16", {"softcap": 15.0, "z_loss": 1e-4}, "ignored_targets")]
    return [*found, Case(op, odd, "fp32", {"softcap": 15.0, "z_loss": 1e-4}, "ignored_targets")]


def optimizer_cases() -> list[Case]:
    """Return AdamW over many and few tensors, and Newton-Schulz of wide, tall and large ones."""
    found = [Case("adamw", {"L": 1, "C": 96}, dtype) for dtype in ("bf16", "fp16", "fp32")]
    found += [Case("adamw", {"L": 4, "C": 768}, "bf16"), Case("adamw", {"L": 3, "C": 50}, "fp32")]
    for B, M, N in ((2, 200, 300), (2, 1536, 768), (1, 2048, 2048), (3, 40, 72)):
        sizes = {"B": B, "M": M, "N": N}
        found += [Case("newton_schulz", sizes, dtype) for dtype in ("bf16", "fp32")]
    return found


def sampling_cases() -> list[Case]:
    """Return the sampler at several vocabularies and filters, and its random numbers."""
    filters = [
        {}, {"top_k": 0}, {"top_k": 1}, {"top_k": 0, "top_p": 1.0, "min_p": 0.05},
        {"top_k": 0, "top_p": 1.0, "temperature": 1.0}, {"temperature": 0.0},
    ]  # fmt: skip
    found = [Case("sample", {"B": 64, "V": 50304}, "fp32", dict(options)) for options in filters]
    found += [Case("sample", {"B": 64, "V": V}, "fp32") for V in (301, 131071)]
    return [*found, *(Case("uniform", {"B": B, "V": 8}, "fp32") for B in (1, 1000))]


def _alibi(data: Data) -> Data:
    heads = data.leaves["q"].shape[2]
    slopes = 2.0 ** -torch.arange(1, heads + 1, device=data.leaves["q"].device)
    return replace(data, others={**data.others, "alibi_slopes": slopes})


def _lengths(data: Data) -> Data:
    k = data.others["k"]
    lengths = torch.linspace(1, k.shape[1], len(k), device=k.device).long()
    return replace(data, others={**data.others, "lengths": lengths})


def _ignored_targets(data: Data) -> Data:
    targets = data.others["targets"].clone()
    targets[::7] = -100
    return replace(data, others={**data.others, "targets": targets})


def _qk_norm(data: Data) -> Data:
    """Give rope learned weights of its QK-norm, and rope_cache constant ones."""
    given = data.leaves or data.others
    D = given["q"].shape[-1]
    weight = torch.linspace(0.5, 1.5, D, device=given["q"].device)
    weights = {"q_weight": weight, "k_weight": weight.flip(0)}
    if data.leaves:
        return replace(data, leaves={**data.leaves, **weights})
    return replace(data, others={**data.others, **weights})


def _relu2(data: Data) -> Data:
    """Use a gradient of the input's shape, as relu2 does not halve it."""
    return replace(data, dy=[data.leaves["x"].flip(0)])


def _rope_cache(data: Data) -> Data:
    """Use the first tokens of rope's data as new ones, and caches with other numbers in them."""
    q, k = (data.leaves[name] for name in "qk")
    first = torch.arange(len(q), device=q.device) * 3 % (q.shape[1] - NEW_TOKENS)
    others = {
        **data.others, "q": q[:, :NEW_TOKENS], "k": k[:, :NEW_TOKENS], "v": k[:, -NEW_TOKENS:],
        "cache_k": k.flip(1), "cache_v": k.flip(0, 1), "positions": first,
    }  # fmt: skip
    return Data({}, others)


def _uniform(data: Data) -> Data:
    samples = torch.arange(len(data.others["uniform"]), device=data.others["uniform"].device)
    return Data({}, {"seed": 1337, "samples": samples, "positions": 7 * samples + 1})


CHANGES: dict[str, Callable[[Data], Data]] = {
    "alibi": _alibi,
    "lengths": _lengths,
    "ignored_targets": _ignored_targets,
    "qk_norm": _qk_norm,
    "relu2": _relu2,
    "rope_cache": _rope_cache,
    "uniform": _uniform,
}
