"""What is not finite on one of two ranks: both leave the step out, and both remain alike."""

import json

import pytest

from minillm.checkpoint.find import open_checkpoint
from tests.conftest import TINY
from tests.support.processes import launch

pytestmark = pytest.mark.slow


def two_ranks(tmp_path, text_file, zero: int, calls: str, value: str, **more) -> list[list[str]]:
    """The digests of both ranks' weights after each step. Rank 1 is spoilt at these calls.

    There are two a step, and some before, by which a step's time is measured.
    """
    flags = TINY | {
        "--data": text_file, "--cache-dir": tmp_path / "cache", "--out": tmp_path / "run",
        "--zero": zero, "--micro-batch-size": 1, "--eval-every": 0, "--optimizer": "adamw", **more,
    }  # fmt: skip
    words = [x for pair in flags.items() for x in pair]
    said = launch(2, "tests/support/mishap_ranks.py", 1, calls, value, *words)
    return [json.loads(text.splitlines()[-1]) for text in said]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("value", ["nan", "inf", "1e30"])
def test_one_rank_of_two(tmp_path, text_file, zero, value):
    more = {"--save-every": 3}
    first, second = two_ranks(tmp_path, text_file, zero, "8,9,13", value, **more)
    assert first == second and len(first) == 8
    still = [step for step in range(1, 8) if first[step] == first[step - 1]]
    assert len(still) == 2, still
    records = [json.loads(line) for line in (tmp_path / "run/bad-steps.jsonl").open()]
    assert [r["step"] - 1 for r in records] == still
    assert all(len(r["sequences"]) == 4 and r["layer"] for r in records)  # of both ranks


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_both_ranks_roll_back(tmp_path, text_file, zero):
    more = {"--save-every": 4, "--keep-last": 9, "--steps": 24}
    calls = ",".join(map(str, range(20, 46)))
    first, second = two_ranks(tmp_path, text_file, zero, calls, "nan", **more)
    assert first == second
    state = open_checkpoint(tmp_path / "run").state
    assert state["step"] == 24 and state["guard"]["rollbacks"] == 1
    assert state["progress"]["skipped"] >= 200
