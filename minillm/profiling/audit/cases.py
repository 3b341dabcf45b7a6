"""List the cases of the audit: each public operation, forward and backward, in configurations.

A case runs on a dry GPU, which computes nothing. Tensors are as small as possible while the same
kernels are compiled. Sizes are multiples of 16, as in a model, so that Triton may use wide loads.
Loops run more than once, so that the compiler does not remove them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from minillm.runtime.device import DTYPES

ARCHS = (80, 90, 100)
HEAD_WIDTHS = (32, 64, 96, 128)
MASKS = ("window", "documents", "softcap", "alibi")
SAMPLING = ("top_k", "top_p", "min_p")

# Kernels whose data come from memory although they multiply: each token reads all keys once.
STREAMING = ("_decode_attention",)


@dataclass(frozen=True)
class Case:
    """One call of an operation, for one architecture.

    arch: 80, 90 or 100
    op: name of the operation
    dtype: "fp32", "fp16" or "bf16"
    size: head width, row width, vocabulary or side of a matrix (0: none)
    features: options that are on
    """

    arch: int
    op: str
    dtype: str = "bf16"
    size: int = 64
    features: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The words that distinguish the cases of one operation and architecture."""
        words = [self.dtype, str(self.size) if self.size else "", "+".join(self.features)]
        return " ".join(word for word in words if word)

    def run(self) -> None:
        """Call the operation, and its backward pass if it has one and is not to "evaluate"."""
        with torch.set_grad_enabled("evaluate" not in self.features):
            RUN[self.op](self)

    def tensor(self, *shape: int, dtype: str = "") -> Tensor:
        """Return a tensor without values that needs a gradient.

        shape: shape of the tensor
        dtype: name of its dtype; "": the case's
        """
        return torch.empty(shape, dtype=DTYPES[dtype or self.dtype]).requires_grad_()


def _differentiate(outputs: Tensor | tuple[Tensor, ...], *inputs: Tensor) -> None:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if torch.is_grad_enabled():
        torch.autograd.grad(outputs, inputs, [torch.empty_like(y) for y in outputs])


def _rows(width: int) -> int:
    """Return enough rows that each program of a norm's backward pass loops, as in real use."""
    return 4352 if width <= 1024 else 1088


def _norm(case: Case) -> None:
    from minillm.kernels.rms_norm import add_rms_norm, rms_norm
    from minillm.kernels.sandwich_norm import sandwich_norm

    rows = case.tensor(_rows(case.size), case.size), case.tensor(_rows(case.size), case.size)
    weights = [case.tensor(case.size, dtype="fp32") for _ in range(2)]
    op, inputs = {
        "rms_norm": (rms_norm, (rows[0], weights[0])),
        "add_rms_norm": (add_rms_norm, (*rows, weights[0])),
        "sandwich_norm": (sandwich_norm, (*rows, *weights)),
    }[case.op]
    _differentiate(op(*inputs), *inputs)


def _rope(case: Case) -> None:
    from minillm.kernels.rope import rope
    from minillm.kernels.rope_cache import rope_cache

    B, T, H, G, D = 2, 512, 8, 2, case.size
    q, k, v = (case.tensor(B, T, heads, D) for heads in (H, G, G))
    weights = [case.tensor(D, dtype="fp32") for _ in range(2)] if "qk_norm" in case.features else []
    angles = [torch.empty(T, D // 2) for _ in range(2)]
    if case.op == "rope":
        _differentiate(rope(q, k, *angles, *weights), q, k, *weights)
        return
    cache = [torch.empty(B, T, G, D, dtype=q.dtype) for _ in range(2)]
    with torch.no_grad():
        new = [x[:, :16] for x in (q, k, v)]
        rope_cache(*new, *angles, *cache, torch.zeros(B, dtype=torch.int64), *weights)


def _masks(case: Case, B: int, T: int, H: int) -> dict:
    options: dict = {}
    if "window" in case.features:
        options["window"] = 200
    if "documents" in case.features:
        options["documents"] = torch.zeros(B, T, dtype=torch.int64)
    if "softcap" in case.features:
        options["softcap"] = 30.0
    if "alibi" in case.features:
        options["alibi_slopes"] = torch.zeros(H)
    return options


def _attention(case: Case) -> None:
    from minillm.kernels.attention import attention

    B, T, H, D = 2, 512, 8, case.size
    G = H if "mha" in case.features else 2
    q, k, v = (case.tensor(B, T, heads, D) for heads in (H, G, G))
    _differentiate(attention(q, k, v, **_masks(case, B, T, H)), q, k, v)


def _decode_attention(case: Case) -> None:
    from minillm.kernels.decode_attention import decode_attention

    B, H, G, D = 2, 8, 2, case.size
    # Queries that share a key head fill one block of rows with 4 new tokens, and two with 8.
    T = next((n for n in (4, 8) if f"{n} tokens" in case.features), 1)
    S = next((n for n in (1024, 2048) if f"{n} keys" in case.features), 4096)
    q, k, v = case.tensor(B, T, H, D), case.tensor(B, S, G, D), case.tensor(B, S, G, D)
    lengths = None if "even" in case.features else torch.full((B,), S)
    with torch.no_grad():
        decode_attention(q, k, v, lengths, **_masks(case, B, S, H))


def _activation(case: Case) -> None:
    from minillm.kernels.swiglu import geglu, relu2, swiglu

    op = {"swiglu": swiglu, "geglu": geglu, "relu2": relu2}[case.op]
    x = case.tensor(64, case.size if case.op == "relu2" else 2 * case.size)
    _differentiate(op(x), x)


def _linear_cross_entropy(case: Case) -> None:
    from minillm.kernels.linear_cross_entropy import linear_cross_entropy

    N, V, C = 16, case.size, 64
    x, w = case.tensor(N, C), case.tensor(V, C)
    targets = torch.zeros(N, dtype=torch.int64)
    options = {"softcap": 30.0} if "softcap" in case.features else {}
    _differentiate(linear_cross_entropy(x, w, targets, z_loss=1e-4, **options), x, w)


def _adamw(case: Case) -> None:
    from minillm.kernels.adamw import adamw

    shapes = [(512, 768), (2048,), (96, 64)]
    params, first, second = ([torch.zeros(s) for s in shapes] for _ in range(3))
    grads = [torch.zeros(s, dtype=DTYPES[case.dtype]) for s in shapes]
    copies = [torch.zeros(s, dtype=torch.bfloat16) for s in shapes]
    adamw(
        params, grads, first, second, 3, lr=[1e-3] * 3, weight_decay=[0.1] * 3,
        grad_scale=torch.ones(()) if "clip" in case.features else None,
        copies=copies if "copies" in case.features else None,
    )  # fmt: skip


def _newton_schulz(case: Case) -> None:
    from minillm.kernels.newton_schulz import newton_schulz

    n = case.size
    shape = (2, 2 * n, n) if "tall" in case.features else (2, n, 2 * n)
    newton_schulz(torch.zeros(shape, dtype=DTYPES[case.dtype]), 1)


def _sample(case: Case) -> None:
    from minillm.kernels.sample import sample, uniform

    index = torch.zeros(16, dtype=torch.int64)
    if case.op == "uniform":
        uniform(7, index, index)
        return
    chosen = {"top_k": 40, "top_p": 0.9, "min_p": 0.05}
    options = {name: value for name, value in chosen.items() if name in case.features}
    logits = torch.zeros(16, case.size, dtype=DTYPES[case.dtype])
    temperature = 0.0 if "greedy" in case.features else 0.7
    sample(logits, torch.zeros(16), temperature=temperature, **options)


RUN: dict[str, Callable[[Case], None]] = {
    "rms_norm": _norm,
    "add_rms_norm": _norm,
    "sandwich_norm": _norm,
    "rope": _rope,
    "rope_cache": _rope,
    "attention": _attention,
    "decode_attention": _decode_attention,
    "swiglu": _activation,
    "geglu": _activation,
    "relu2": _activation,
    "linear_cross_entropy": _linear_cross_entropy,
    "adamw": _adamw,
    "newton_schulz": _newton_schulz,
    "sample": _sample,
    "uniform": _sample,
}


def table_sizes(operation: str, top: int) -> list[int]:
    """Return the sizes in the tables of an operation's tiles; [] if it has none.

    operation: name of the file of tables
    top: largest size; larger ones become it, and those below 16 are left out
    """
    from minillm.kernels._launch import TILES

    path = TILES / f"{operation}.json"
    tables = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = [row for kernel in tables.values() for arch in kernel.values() for row in arch]
    return sorted({min(int(row), top) for row in rows if int(row) >= 16})


def _subsets(features: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [c for n in range(len(features) + 1) for c in combinations(features, n)]


def subset() -> list[Case]:
    """Return at most 120 builds that every commit must pass: each kernel, head width, architecture.

    All are bf16 with the features that cost most. Attention has every head width on every
    architecture. Each other kernel has every architecture once.
    """
    cases: list[Case] = []
    for arch in ARCHS:
        cases += [Case(arch, "attention", "bf16", D, MASKS) for D in HEAD_WIDTHS]
        cases += [Case(arch, "decode_attention", "bf16", 128, MASKS[:1] + MASKS[2:])]
        cases += [Case(arch, "linear_cross_entropy", "bf16", 50304, ("softcap",))]
        cases += [Case(arch, "newton_schulz", "bf16", 768)]
        # Narrow and wide rows have different kernels.
        cases += [Case(arch, "rms_norm", "bf16", 1024), Case(arch, "add_rms_norm", "bf16", 16384)]
        cases += [Case(arch, "sandwich_norm", "bf16", C) for C in (1024, 8192)]
        cases += [Case(arch, op, "bf16", 128, ("qk_norm",)) for op in ("rope", "rope_cache")]
        cases += [Case(arch, "swiglu", "bf16", 2048)]
        cases += [Case(arch, "adamw", "bf16", 0, ("clip", "copies"))]
        cases += [Case(arch, "sample", "fp32", 32768, SAMPLING), Case(arch, "uniform", "fp32", 0)]
    return cases


def full() -> list[Case]:
    """Return every kernel, row of its tables, dtype, combination of features, and architecture."""
    return [case for arch in ARCHS for case in (*_full_attention(arch), *_full_rest(arch))]


def _full_attention(arch: int) -> list[Case]:
    cases = []
    for D in HEAD_WIDTHS:
        for dtype in DTYPES:
            cases += [Case(arch, "attention", dtype, D, f) for f in _subsets(MASKS)]
            cases += [Case(arch, "attention", dtype, D, ("mha",))]
            some = MASKS[:1] + MASKS[2:]
            cases += [Case(arch, "decode_attention", dtype, D, f) for f in _subsets(some)]
            sizes = ("4 tokens", "8 tokens", "1024 keys", "2048 keys", "even")
            cases += [Case(arch, "decode_attention", dtype, D, (f,)) for f in sizes]
    for D in sorted({*HEAD_WIDTHS, *table_sizes("rope", 256)}):
        for dtype in DTYPES:
            for op in ("rope", "rope_cache"):
                cases += [Case(arch, op, dtype, D, f) for f in ((), ("qk_norm",))]
    return cases


def _full_rest(arch: int) -> list[Case]:
    cases = []
    widths = sorted({256, 512, 768, 2048, 4096, 8192, *table_sizes("rms_norm", 16384)})
    vocabularies = sorted({256, 4096, 50304, *table_sizes("sample", 131072)})
    for dtype in DTYPES:
        for op in ("rms_norm", "add_rms_norm", "sandwich_norm"):
            cases += [Case(arch, op, dtype, C, f) for C in widths for f in ((), ("evaluate",))]
        for op in ("swiglu", "geglu", "relu2"):
            cases += [Case(arch, op, dtype, F) for F in table_sizes("swiglu", 2048)]
        for V in sorted({512, 50304, *table_sizes("linear_cross_entropy", 131072)}):
            features = _subsets(("softcap", "evaluate"))
            cases += [Case(arch, "linear_cross_entropy", dtype, V, f) for f in features]
        cases += [Case(arch, "adamw", dtype, 0, f) for f in _subsets(("clip", "copies"))]
        for n in table_sizes("newton_schulz", 768):
            cases += [Case(arch, "newton_schulz", dtype, n, f) for f in ((), ("tall",))]
        for V in vocabularies:
            filters = (*_subsets(SAMPLING[:2]), SAMPLING, ("greedy",))
            cases += [Case(arch, "sample", dtype, V, f) for f in filters]
    return [*cases, Case(arch, "uniform", "fp32", 0)]
