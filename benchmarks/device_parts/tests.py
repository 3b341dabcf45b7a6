"""Part `tests`: `pytest -m gpu tests/kernels`, as far as the time allows."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable

from benchmarks.device_parts.session import Session

WORKERS = 12
PASSED_A_ROW = 200  # a row is written after each that many tests that pass
DRY = ["tests/kernels/test_signatures.py"]
# A line of `pytest -v`, with and without processes of pytest-xdist.
OUTCOME = re.compile(
    r"^\[gw\d+\].* (?P<outcome>[A-Z]+) (?P<test>tests/.*)"
    r"|^(?P<test_>tests/.*) (?P<outcome_>PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b"
)


def run(session: Session) -> None:
    """Write the rows of pytest's run; the last one has its exit code and its summary."""
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "--tb=short"]
    start = time.monotonic()
    process = subprocess.Popen(
        words + (DRY if session.dry else _flags_on_gpu()), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    counts, summary = follow(process.stdout, session)
    code, seconds = process.wait(), round(time.monotonic() - start, 1)
    verdict = "right" if code == 0 else f"WRONG: pytest ended with exit code {code}"
    session.emit(verdict=verdict, **counts, seconds=seconds, said=summary)


def follow(lines: Iterable[str], session: Session) -> tuple[Counter, str]:
    """Print pytest's lines, and write a row for each test that fails, as soon as it does.

    lines: output of pytest
    session: session of the part

    Returns the number of tests by outcome, and the last line.
    """
    counts: Counter = Counter()
    last = ""
    for line in lines:
        print(line, end="", flush=True)
        last = line.strip() or last
        if (found := OUTCOME.match(line)) is None:
            continue
        outcome = found["outcome"] or found["outcome_"]
        test = (found["test"] or found["test_"]).strip()
        counts[outcome.lower()] += 1
        if outcome in ("FAILED", "ERROR"):
            session.emit(verdict=f"WRONG: {outcome.lower()}", test=test)
        elif outcome == "PASSED" and counts["passed"] % PASSED_A_ROW == 0:
            session.emit(passed_so_far=counts["passed"])
    return counts, last


def _flags_on_gpu() -> list[str]:
    workers = str(min(WORKERS, os.cpu_count() or 1))
    return ["-m", "gpu and not slow", "-n", workers, "--dist", "worksteal", "tests/kernels"]
