"""Catalogue: costs against figures by hand, attention's options, and the implementations."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.model.size import n_parameters
from minillm.ops import EAGER, REFERENCE
from minillm.profiling.catalogue.entry import BACKWARD, BOTH, FORWARD
from minillm.profiling.catalogue.problem import CATALOGUE, Problem, problems_of, small_problem
from minillm.profiling.timing import decoding, implementations, operations, precision, steps

CPU, GPU = torch.device("cpu"), torch.device("cuda")

# By hand: operation, sizes, and for each direction FLOPs and bytes; bf16 but for `sample`.
ATTENTION = {"B": 2, "T": 64, "H": 4, "D": 16}
ROWS = {"N": 100, "C": 10}
COSTS = [
    # 4 D FLOPs for each of 2 x 4 x 64^2 / 2 pairs; q k v y of 8192 numbers; 8 tensors; 12
    ("attention", ATTENTION, FORWARD, 1048576, 65536),
    ("attention", ATTENTION, BACKWARD, 2621440, 131072),
    ("attention", ATTENTION, BOTH, 3670016, 196608),
    # k and v are a quarter
    ("attention", {**ATTENTION, "G": 1}, FORWARD, 1048576, 40960),
    ("attention", {**ATTENTION, "G": 1}, BACKWARD, 2621440, 81920),
    # 16 keys but for the first 15 queries, the own one half: 64 x 15.5 - 120 = 872 pairs of 2048
    ("attention", {**ATTENTION, "W": 16}, FORWARD, 446464, 65536),
    ("attention", {**ATTENTION, "W": 64}, FORWARD, 1048576, 65536),
    # documents of 21 and 43: 220.5 + 924.5 pairs; with a window 220.5 + 43 x 29.5 - 435
    ("attention", {**ATTENTION, "docs": 2}, FORWARD, 586240, 65536),
    ("attention", {**ATTENTION, "docs": 2, "W": 30}, FORWARD, 539648, 65536),
    ("attention", {**ATTENTION, "cap": 30}, FORWARD, 1048576, 65536),
    # 4 D a key of each query head; k and v of 2 x 50 x 2 x 16 numbers
    ("decode_attention", {"B": 2, "S": 50, "H": 4, "G": 2, "D": 16}, FORWARD, 25600, 12800),
    ("rms_norm", ROWS, FORWARD, 4000, 4000),  # x; y
    ("rms_norm", ROWS, BACKWARD, 8000, 6000),  # x dy; dx
    ("add_rms_norm", ROWS, FORWARD, 5000, 8000),  # x residual; y sum
    ("add_rms_norm", ROWS, BACKWARD, 9000, 8000),  # sum dy dsum; dx
    ("sandwich_norm", ROWS, FORWARD, 9000, 8000),  # x residual; y h
    ("sandwich_norm", ROWS, BACKWARD, 17000, 10000),  # x residual dy dh; dx
    # 3 for each of 2 x 8 x (3 + 1) x 4 numbers, in and out
    ("rope", {"B": 2, "T": 8, "H": 3, "G": 1, "D": 4}, FORWARD, 768, 1024),
    ("rope", {"B": 2, "T": 8, "H": 3, "G": 1, "D": 4}, BACKWARD, 768, 1024),
    ("swiglu", {"N": 100, "F": 10}, FORWARD, 5000, 6000),  # gate up; y
    ("swiglu", {"N": 100, "F": 10}, BACKWARD, 10000, 10000),  # gate up dy; dgate dup
    # a product of 2 N C V, or three; x and w, or their gradients too
    ("linear_cross_entropy", {"N": 10, "C": 20, "V": 30}, FORWARD, 12000, 1600),
    ("linear_cross_entropy", {"N": 10, "C": 20, "V": 30}, BOTH, 36000, 3200),
    # 12 of each of 2 x (12 x 100 + 20) parameters; p m v in and out in fp32, g in bf16
    ("adamw", {"L": 2, "C": 10}, FORWARD, 29280, 63440),
    # five steps of 4 x 4 x 6 + 4^3 + 2 x 4 x 4 x 6 of each of three matrices
    ("newton_schulz", {"B": 3, "M": 4, "N": 6}, FORWARD, 5280, 288),
    ("newton_schulz", {"B": 3, "M": 6, "N": 4}, FORWARD, 5280, 288),
    ("sample", {"B": 3, "V": 100}, FORWARD, 1500, 1200),
]


@pytest.mark.parametrize("op, size, direction, flops, moved", COSTS)
def test_costs(op, size, direction, flops, moved):
    problem = Problem(op, size, "fp32" if op == "sample" else "bf16")
    assert direction in problem.directions
    assert problem.cost(direction) == (flops, moved)


def test_no_operation_and_no_direction_is_without_a_cost_by_hand():
    known = {(op, direction) for op, _, direction, *_ in COSTS}
    assert known == {(op, d) for op in CATALOGUE for d in small_problem(op, "bf16").directions}


OPTIONS = [{"G": 2}, {"W": 5}, {"docs": 3}, {"docs": 3, "W": 5}, {"cap": 2}]


@pytest.mark.parametrize("more", OPTIONS, ids=str)
def test_the_pairs_counted_are_those_that_the_mask_shows(more):
    problem = Problem("attention", {"B": 1, "T": 48, "H": 2, "D": 48, **more}, "fp32")
    q, k, v = problem.data(CPU).leaves.values()
    options = {n: x for n, x in problem.data(CPU).others.items() if n != "softcap"}
    eye = torch.eye(48)[None, :, None].expand(v.shape)  # so that weights come out
    seen = (REFERENCE.attention(q, k, eye, **options) > 0).sum().item()
    # A query and its own key are seen, but count half.
    assert problem.cost(FORWARD)[0] == 4 * 48 * (seen - 2 * 48 / 2)


@pytest.mark.parametrize("more", [{}, *OPTIONS], ids=str)
def test_attention_with_options_is_judged_by_a_part(more):
    problem = Problem("attention", {"B": 2, "T": 24, "H": 4, "D": 16, **more}, "fp32")
    data = problem.data(CPU)
    true = precision.truth(problem, data)
    share = 2 if "G" in more else 1
    assert [x.shape[2] for x in true[BOTH]] == [share, share, 1, 1]
    found = precision.errors(EAGER.attention, data, true)
    assert max(found.values()) < 1e-5 and set(found) == set(problem.directions)
    plain = precision.errors(lambda q, k, v, **_: EAGER.attention(q, k, v), data, true)
    assert (plain[FORWARD] > 1e-3) == bool(more.keys() - {"G"})  # the options reach the truth


def test_documents_fill_each_row_and_are_of_different_lengths():
    problem = Problem("attention", {"B": 2, "T": 64, "H": 1, "D": 16, "docs": 8}, "fp32")
    documents = problem.data(CPU).others["documents"]
    assert documents.shape == (2, 64) and torch.equal(documents[0], documents[1])
    assert not documents.is_floating_point() and (documents.diff() >= 0).all()
    assert all(a < b for a, b in pairwise(documents[0].bincount().tolist()))


def test_attention_on_a_gpu_is_measured_with_each_of_its_options():
    cells = [p.sizes for p in problems_of(("attention",), "cuda", "bf16")]
    assert len(cells) == 14
    assert [s["H"] // s["G"] for s in cells if "G" in s] == [4]
    for letter, value, T in (("W", 1024, 16384), ("docs", 8, 16384), ("cap", 30, 4096)):
        assert [s["T"] for s in cells if s.get(letter) == value] == [T]


def test_both_ways_of_attention_are_one_trial():
    data = Problem("attention", {"B": 1, "T": 24, "H": 2, "D": 16}, "fp32").data(CPU)
    calls = []

    def counted(**given):
        calls.append(1)
        return EAGER.attention(**given)

    trial = operations.trial_of(counted, data, BOTH)
    assert trial.prepare() is None and calls == []  # the forward pass is timed
    found = trial.once()
    assert calls == [1] and len(found) == 3
    true = precision.results(EAGER.attention, data)[BACKWARD]
    assert all(torch.equal(x, y) for x, y in zip(found, true, strict=True))


def test_rope_is_given_the_tables_that_a_model_has():
    others = small_problem("rope", "bf16").data(CPU).others
    assert {x.dtype for x in others.values()} == {torch.float32}


class Operators(TorchDispatchMode):
    """Record of the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def found_for(problem: Problem, device: torch.device = CPU) -> dict:
    return implementations.implementations(problem, device, False, "no Triton")


def test_the_vendors_adamw_is_the_fused_kernel_and_nothing_else():
    problem = Problem("adamw", {"L": 1, "C": 16}, "bf16")
    data = problem.data(CPU)
    vendor = found_for(problem)["vendor"]
    assert precision.errors(vendor, data, precision.truth(problem, data))[FORWARD] < 1e-6
    trial = operations.trial_of(vendor, data, FORWARD)
    trial.once()  # every trial is run before it is timed
    with Operators() as called:
        trial.once()
    assert called.names == ["_fused_adamw_"]


def test_the_vendors_adamw_keeps_no_gradients_of_another_call():
    problem = Problem("adamw", {"L": 1, "C": 16}, "bf16")
    vendor = found_for(problem)["vendor"]
    for seed in range(2):
        data = problem.data(CPU, seed)
        assert precision.errors(vendor, data, precision.truth(problem, data))[FORWARD] < 1e-6
    assert found_for(problem)["vendor"] is not vendor


@pytest.mark.parametrize("op", CATALOGUE)
def test_no_vendor_computes_just_what_eager_does(op):
    problem = small_problem(op, "bf16")
    data, found = problem.data(CPU), found_for(problem)
    if "vendor" not in found:
        return
    names = []
    for name in ("eager", "vendor"):
        with Operators() as called:
            operations.trial_of(found[name], data, FORWARD).once()
        names.append(called.names)
    assert names[0] != names[1]


ENABLED = {
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "math": torch.backends.cuda.math_sdp_enabled,
}


@pytest.mark.parametrize("op", ["attention", "decode_attention"])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_back_end_is_the_only_one_allowed_while_it_is_measured(op, grouped, monkeypatch):
    problem = small_problem(op, "fp32")
    size = {**problem.sizes, "H": 4, "G": 2 if grouped else 4}
    problem, plain, seen = Problem(op, size, "fp32"), F.scaled_dot_product_attention, []

    def attend(*given, **options):
        seen.append(({name for name, on in ENABLED.items() if on()}, options))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return plain(*given, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    data = problem.data(CPU)
    true = precision.truth(problem, data)
    found = found_for(problem, GPU)
    for name in implementations.BACKENDS:
        assert precision.errors(found[name], data, true)[FORWARD] < 1e-5
        enabled, options = seen.pop()
        assert enabled == {name}
        assert options == {"is_causal": op == "attention", "enable_gqa": grouped}


def test_flash_on_a_cpu_is_flash():
    problem = small_problem("attention", "fp32")
    with Operators() as called:
        operations.trial_of(found_for(problem)["flash"], problem.data(CPU), FORWARD).once()
    assert any("flash_attention" in name for name in called.names)


@pytest.mark.parametrize("more, word", [
    ({"W": 8}, "window"), ({"docs": 2}, "documents"), ({"cap": 30}, "soft-cap"),
])  # fmt: skip
def test_a_vendor_that_cannot_is_absent_and_says_why(more, word):
    problem = Problem("attention", {"B": 1, "T": 24, "H": 2, "D": 16, **more}, "fp32")
    found = found_for(problem, GPU)
    for name in implementations.BACKENDS:
        assert found[name] == f"scaled_dot_product_attention has no {word}"
    assert callable(found["eager"])


def test_models_are_as_large_as_is_said():
    for said, config in (
        (steps.size.__doc__, steps.size("cuda", False).model),
        (decoding.shape.__doc__, decoding.shape("cuda", 16385)),
    ):
        assert f"{n_parameters(config) / 1e6:.0f}M parameters" in said
