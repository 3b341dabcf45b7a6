"""Trainings killed at random instants, and asked to end: nothing is lost, nothing is different.

benchmarks/reliability/kill.py makes the trials and judges them, in a process of its own: it forks,
and so must have no threads.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "reliability" / "kill.py"
BEFORE = {"starting", "preparing", "beginning"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="each trial has its own process"),
    pytest.mark.skipif(not FILE.is_file(), reason="the source tree is not here"),
]


def trials(kills: int, kills_of_two: int, stops: int) -> dict:
    """All that so many trials found; AssertionError if one of them failed."""
    words = [kills, kills_of_two, stops, "--seed", 1, "--json"]
    done = subprocess.run(
        [sys.executable, str(FILE), *map(str, words)], capture_output=True, text=True, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kills, of_two", [(40, 0), (0, 12)], ids=["one process", "two ranks"])
def test_a_run_goes_on_as_if_nobody_had_killed_it(capsys, kills, of_two):
    found = trials(kills, of_two, 0)
    hits = found["kills"]["two ranks" if of_two else "one process"]
    doing = [hit["doing"] for hit in hits]
    share = sum(what == "saving" for what in doing) / len(doing)
    with capsys.disabled():
        counts = ", ".join(f"{doing.count(what)} {what}" for what in sorted(set(doing)))
        print(f"\n{len(doing)} kills, {share:.0%} of them in saving: {counts}")
    assert len(doing) >= max(kills, of_two) and share >= 0.4
    assert 1 <= max(hit["redone"] for hit in hits) <= 2  # steps; --save-every 2
    assert any(hit["resumed"] for hit in hits)
    if of_two:
        assert {hit["who"] for hit in hits} == {"rank 0", "rank 1", "both ranks"}
        assert max(hit["survived_s"] for hit in hits) < 10
    else:
        assert BEFORE & set(doing) and {"resuming", "pruning"} <= set(doing)


def test_a_run_goes_on_as_if_nobody_had_asked_it_to_end():
    found = trials(0, 0, 9)
    assert len(found["stops"]["one process"]) == 9 and len(found["stops"]["two ranks"]) == 3
    assert max(found["impatient_s"]) < 5  # until the second signal had ended it, in a save of 30 s
