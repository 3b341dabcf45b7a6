"""Write rows of the profiler's suite `kernels`, one line for each problem and direction.

The parts `attention` and `operations` measure with it.
"""

from collections.abc import Sequence

from benchmarks.device_parts.session import Session
from minillm.profiling.catalogue.problem import Problem
from minillm.profiling.timing import operations
from minillm.profiling.timing.operations import Effort, Row

SECONDS = 0.05  # time for the runs of each figure


def measure(session: Session, problems: Sequence[Problem], names: Sequence[str], unit: str) -> None:
    """Measure each problem, and write its rows as soon as they are known.

    session: session of the part
    problems: problems to measure
    names: names of the implementations, which become columns
    unit: figure in these columns, "tflops" or "median_us"
    """
    effort = Effort(0.0 if session.dry else SECONDS, compiled=False)
    for problem in problems:
        where = {"op": problem.op, "shape": problem.shape}
        if session.late(**where):
            continue
        print(*where.values(), flush=True)
        with session.noted(**where):
            rows = operations.run([problem], session.device, session.roofs, effort, print)
            for direction in problem.directions:
                session.emit(**line(problem, direction, rows, names, unit))


def line(
    problem: Problem, direction: str, rows: Sequence[Row], names: Sequence[str], unit: str
) -> Row:
    """Return one row with a column for each implementation.

    problem: the problem
    direction: the direction
    rows: rows of the suite, one for each implementation and direction
    names, unit: see `measure`
    """
    found = {row["implementation"]: row for row in rows if row["direction"] == direction}
    ours = found.get("triton", found["eager"])  # only eager has a row where the truth failed
    return {
        "op": problem.op, "shape": problem.shape, "direction": direction, "unit": unit,
        **{name: found[name][unit] if name in found else None for name in names},
        "gbps": ours["gbps"], "percent_of_ceiling": ours["percent_of_ceiling"],
        "error": ours["error"], "peak_bytes": ours["peak_bytes"], "note": ours["note"],
    }  # fmt: skip
