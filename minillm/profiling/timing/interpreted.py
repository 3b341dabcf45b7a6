"""Compute the errors of our kernels without a GPU, by running each in Triton's interpreter.

Triton decides when it is imported whether it interprets. The kernels therefore run in a separate
process, whose program is `main`. No times are measured, because they would mean nothing.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from minillm.ops import select
from minillm.profiling.catalogue.problem import Problem
from minillm.profiling.timing import precision
from minillm.profiling.timing.implementations import error_in_words

ROOT = Path(__file__).resolve().parents[3]
LIMIT_S = 600


def errors(problems: Sequence[Problem]) -> list[dict]:
    """Return the errors of our kernel for each problem, by direction, or a "note" if it fails."""
    code = (
        f"import sys; sys.path.append({str(ROOT)!r});"
        "from minillm.profiling.timing import interpreted; interpreted.main()"
    )
    # Only the child has the variable: this process may still time and compile kernels.
    words = ["env", "TRITON_INTERPRET=1", sys.executable, "-c", code]
    given = json.dumps([asdict(problem) for problem in problems])
    try:
        done = subprocess.run(
            words,
            input=given,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=LIMIT_S,
        )
        if done.returncode == 0:
            return json.loads(done.stdout)
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit code {done.returncode}"
    except (OSError, ValueError, subprocess.TimeoutExpired) as e:
        reason = error_in_words(e)
    return [{"errors": {}, "note": f"the interpreter failed: {reason}"} for _ in problems]


def main() -> None:
    """Read problems from standard input and write their errors to standard output, as JSON."""
    torch.set_num_threads(1)
    problems = [Problem(**given) for given in json.load(sys.stdin)]
    json.dump([_solve(problem) for problem in problems], sys.stdout)


def _solve(problem: Problem) -> dict:
    try:
        ours = getattr(select("triton", "cpu"), problem.op)
        data = problem.data(torch.device("cpu"))
        return {"errors": precision.errors(ours, data, precision.truth(problem, data)), "note": ""}
    except Exception as e:  # a kernel that fails is a result
        return {"errors": {}, "note": error_in_words(e)}
