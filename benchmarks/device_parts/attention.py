"""Part `attention`: our kernel against PyTorch's flash attention and cuDNN's, in TFLOP/s.

Head widths 64 and 128, 1k to 16k tokens, forward, backward and both; then a window, documents,
grouped heads and a soft-cap.
"""

from benchmarks.device_parts.measured import measure
from benchmarks.device_parts.session import Session
from minillm.profiling.catalogue.problem import Problem, problems_of, small_problem

LENGTHS = (4096, 1024, 16384, 2048, 8192)  # if time runs out, the middle and the ends are there
NAMES = ("triton", "flash", "cudnn", "efficient")


def run(session: Session) -> None:
    """Write a row for each problem and direction."""
    if session.dry:
        problems = [small_problem("attention", session.dtype)]
    else:
        problems = sorted(problems_of(("attention",), "cuda", session.dtype), key=_order)
    measure(session, problems, NAMES, "tflops")


def _order(problem: Problem) -> tuple[int, bool]:
    plain = set(problem.sizes) == {"B", "T", "H", "D"}
    return LENGTHS.index(problem.sizes["T"]), not plain
