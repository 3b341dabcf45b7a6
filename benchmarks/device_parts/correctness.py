"""Part `correctness`: compare every operation of ours with the reference in fp64.

Most of the time is the compiler's, so several processes share the cases. Later parts find the
compiled kernels in Triton's cache.

A result is wrong if its error is above twice that of PyTorch's eager code in the same dtype, plus
one unit, see ALLOWED. It is also wrong if a second call gives other bits: no kernel of ours adds in
an order that may change.
"""

import os
import time
from functools import partial

from benchmarks.device_parts.session import Session

WORKERS = 12
# One unit in the last place of bf16 and fp16. Exponentials and long sums need more of fp32's.
ALLOWED = {"bf16": 8e-3, "fp16": 1e-3, "fp32": 5e-6}
TOKENS = 0.05  # share of drawn tokens that may differ, as a number may lie at a token's border


def run(session: Session) -> None:
    """Solve the cases of this worker; the part's own process only starts the workers."""
    if session.worker is None:
        codes = session.spread(2 if session.dry else min(WORKERS, os.cpu_count() or 1))
        for number, code in enumerate(codes):
            if code:
                session.emit(verdict=f"WRONG: worker {number} ended with exit code {code}")
        return
    from benchmarks.device_parts.cases import all_cases, small_cases

    for index, case in session.mine(small_cases() if session.dry else all_cases()):
        where = {
            "op": case.op, "shape": case.problem.shape, "dtype": case.problem.dtype,
            "options": case.words,
        }  # fmt: skip
        print(f"worker {session.worker}:", *where.values(), flush=True)
        if session.over:
            session.emit(verdict="not checked", **where, note="no time left")
            continue
        solve(session, case, where)
        session.begin_again_if_broken(index + 1)


def solve(session: Session, case, where: dict[str, str]) -> None:
    """Write the row of one case. An operation that fails counts as wrong.

    session: session of the worker
    case: the case
    where: columns that name it, for the row
    """
    from minillm.ops import EAGER
    from minillm.profiling.timing.implementations import error_in_words

    start = time.monotonic()
    figures = dict.fromkeys(("forward", "backward", "eager_forward", "eager_backward"))
    try:
        data = case.data(session.device)
        true = truth(case, data)
        ours, repeated = errors(getattr(session.triton, case.op), case, data, true)
        eager, _ = errors(getattr(EAGER, case.op), case, data, true)
        directions = ("forward", "backward") if data.leaves else ("forward",)
        for direction in directions:
            figures[direction] = ours[direction]
            figures[f"eager_{direction}"] = eager[direction]
        verdict = judged(case, directions, ours, eager, repeated)
    except Exception as e:
        verdict = f"WRONG: {error_in_words(e)}"
    seconds = round(time.monotonic() - start, 1)
    session.emit(verdict=verdict, **where, **figures, seconds=seconds)


def truth(case, data) -> dict:
    """Return the results of the reference in fp64.

    case: the case
    data: its data
    """
    import torch

    from minillm.ops import REFERENCE
    from minillm.profiling.timing import precision

    if case.op == "linear_cross_entropy" and not case.words:
        return precision.truth(case.problem, data)  # by rows: all logits would fill the memory
    function = with_caches(case.op, getattr(REFERENCE, case.op))
    return precision.results(function, data, torch.Tensor.double)


def errors(function, case, data, true) -> tuple[dict[str, float], bool]:
    """Return the error of each direction, and whether a second call gives the same bits.

    function: implementation of the operation
    case: the case
    data: its data
    true: results of the reference, see `truth`
    """
    from minillm.profiling.timing import precision

    function = with_caches(case.op, function)
    again = precision.errors(function, data, precision.results(function, data))
    directions = ("forward", "backward") if data.leaves else ("forward",)
    same = all(again[direction] == 0 for direction in directions)
    return precision.errors(function, data, true), same


def judged(case, directions, ours, eager, repeated: bool) -> str:
    """Return "right", or "WRONG" with the reason.

    case: the case
    directions: directions that are compared
    ours, eager: errors by direction
    repeated: whether a second call gave the same bits
    """
    allowed = ALLOWED[case.problem.dtype] + TOKENS * (case.op == "sample")
    bad = [d for d in directions if not ours[d] <= 2 * eager[d] + allowed]
    if bad:
        return f"WRONG {' and '.join(bad)}"
    return "right" if repeated else "WRONG: a second call gives other results"


def with_caches(op: str, function):
    """Return a function that also returns the caches in which rope_cache writes.

    op: name of the operation
    function: its implementation
    """
    return partial(_and_caches, function) if op == "rope_cache" else function


def _and_caches(function, **arguments):
    return function(**arguments), arguments["cache_k"], arguments["cache_v"]
