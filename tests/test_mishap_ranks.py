"""What is not finite on one of two ranks: both leave the step out, and both remain alike."""

import json

import pytest

from tests.conftest import TINY
from tests.processes import launch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("value", ["nan", "inf", "1e30"])
def test_one_rank_of_two(tmp_path, text_file, zero, value):
    flags = TINY | {
        "--data": text_file, "--cache-dir": tmp_path / "cache", "--out": tmp_path / "run",
        "--zero": zero, "--micro-batch-size": 1, "--eval-every": 0, "--save-every": 3,
        "--optimizer": "adamw",
    }  # fmt: skip
    # Two micro-batches a step, after those by which a step's time is measured.
    digests = launch(
        2, "tests/mishap_ranks.py", 1, "8,9,13", value, *(x for pair in flags.items() for x in pair)
    )
    first, second = (json.loads(said.splitlines()[-1]) for said in digests)
    assert first == second and len(first) == 8
    still = [step for step in range(1, 8) if first[step] == first[step - 1]]
    assert len(still) == 2, still
    records = [json.loads(line) for line in (tmp_path / "run/bad-steps.jsonl").open()]
    assert [r["step"] for r in records] == still
    assert all(len(r["sequences"]) == 4 and r["layer"] for r in records)  # of both ranks
