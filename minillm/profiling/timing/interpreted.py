"""The errors of our kernels where there is no GPU: Triton's interpreter runs them, once, small.

It decides when Triton is imported, so it works in a process of its own; `main` is that process.
Times in the interpreter mean nothing, and none are taken.
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
from minillm.profiling.timing.implementations import said

ROOT = Path(__file__).resolve().parents[3]
LIMIT_S = 600


def errors(problems: Sequence[Problem]) -> list[dict]:
    """For each problem the errors of our kernel by direction; {} and a "note" if it failed."""
    code = (
        f"import sys; sys.path.append({str(ROOT)!r});"
        "from minillm.profiling.timing import interpreted; interpreted.main()"
    )
    # The variable is the child's alone: this process may time and compile kernels as before.
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
        reason = said(e)
    return [{"errors": {}, "note": f"the interpreter failed: {reason}"} for _ in problems]


def main() -> None:
    """Read problems from standard input, write what came of them to standard output, as JSON."""
    torch.set_num_threads(1)
    problems = [Problem(**given) for given in json.load(sys.stdin)]
    json.dump([_solve(problem) for problem in problems], sys.stdout)


def _solve(problem: Problem) -> dict:
    try:
        ours = getattr(select("triton", "cpu"), problem.op)
        data = problem.data(torch.device("cpu"))
        return {"errors": precision.errors(ours, data, precision.truth(problem, data)), "note": ""}
    except Exception as e:  # a kernel that fails is a finding
        return {"errors": {}, "note": said(e)}
