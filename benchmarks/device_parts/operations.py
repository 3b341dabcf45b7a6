"""Part `operations`: every other operation against eager code and the vendor's kernels."""

from benchmarks.device_parts.measured import measure
from benchmarks.device_parts.session import Session
from minillm.profiling.catalogue.problem import CATALOGUE, problem_at, problems_of, small_problem

NAMES = ("triton", "eager", "vendor", "flash")
# Besides those of the catalogue: the output layer of 162M parameters and that of a large
# vocabulary, the norm of 162M parameters, and one row to sample.
MORE = (
    ("linear_cross_entropy", {"N": 16384, "C": 768, "V": 50304}),
    ("linear_cross_entropy", {"N": 8192, "C": 2048, "V": 131072}),
    ("add_rms_norm", {"N": 32768, "C": 768}),
    ("sample", {"B": 1, "V": 50304}),
)


def run(session: Session) -> None:
    """Write a row for each problem and direction."""
    if session.dry:
        measure(session, [small_problem("swiglu", session.dtype)], NAMES, "median_us")
        return
    ops = tuple(op for op in CATALOGUE if op != "attention")
    problems = problems_of(ops, "cuda", session.dtype)
    problems += [problem_at(op, sizes, session.dtype) for op, sizes in MORE]
    measure(session, problems, NAMES, "median_us")
