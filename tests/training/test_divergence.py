"""Which steps are left out, and when a run is hopeless."""

import json
import math
from dataclasses import asdict

import pytest

from minillm.training.divergence import ENOUGH, IN_A_ROW, RECENT, WINDOW, DivergenceGuard


def trained(steps: int, norm: float = 1.0) -> DivergenceGuard:
    """After so many good steps, whose norms differ a little."""
    guard = DivergenceGuard()
    for i in range(steps):
        assert guard.reason_to_skip(2.0, norm * (1 + 0.1 * (i % 3))) is None
    return guard


@pytest.mark.parametrize("steps", [0, ENOUGH, 3 * WINDOW])
@pytest.mark.parametrize(
    ("loss", "norm", "why"),
    [
        (math.nan, 1.0, "loss nan, gradient norm 1"),
        (math.inf, math.nan, "loss inf, gradient norm nan"),
        (2.0, math.nan, "gradient norm nan"),
        (2.0, math.inf, "gradient norm inf"),
        (2.0, 1e30, "gradient norm 1e+30, beyond 1e+18"),
    ],
)
def test_what_is_not_finite_or_cannot_be_squared(steps, loss, norm, why):
    guard = trained(steps)
    norms = list(guard.norms)
    assert guard.reason_to_skip(loss, norm) == why
    assert guard.norms == norms
    assert guard.in_a_row == 1 and guard.left_out == [steps + 1]
    assert guard.reason_to_skip(2.0, 1.0) is None and guard.in_a_row == 0


def test_a_spike_is_seen_against_its_history():
    assert trained(ENOUGH - 1).reason_to_skip(2.0, 1e6) is None  # too little to judge by
    guard = trained(ENOUGH)
    assert guard.reason_to_skip(2.0, 9.0) is None  # not ten times the median
    assert trained(ENOUGH).reason_to_skip(2.0, 50.0) == "gradient norm 50, a spike"
    wild = DivergenceGuard(norms=[10.0 ** (i % 4) for i in range(WINDOW)])
    assert wild.reason_to_skip(2.0, 9e3) is None  # nothing new in this history


def test_what_stays_large_is_soon_no_spike():
    """A new text with larger gradients ends no run."""
    guard, bad = trained(WINDOW), 0
    for _ in range(2 * WINDOW):
        bad += guard.reason_to_skip(2.0, 100.0) is not None
        assert not guard.has_diverged
    assert 1 <= bad < IN_A_ROW


def test_hopeless_are_ten_in_a_row_or_one_in_a_hundred():
    guard = trained(5)
    for i in range(IN_A_ROW):
        assert not guard.has_diverged, i
        guard.reason_to_skip(math.nan, 1.0)
    assert guard.has_diverged
    guard = DivergenceGuard()
    for i in range(RECENT):
        assert not guard.has_diverged
        guard.reason_to_skip(math.nan if i % 100 == 0 else 2.0, 1.0)
    assert len(guard.left_out) == 10  # of the last thousand: one in a hundred, and no more
    guard.reason_to_skip(math.nan, 1.0)
    assert len(guard.left_out) == 10 and not guard.has_diverged  # the first has left the window
    guard.reason_to_skip(math.nan, 1.0)
    assert guard.has_diverged


def test_a_roll_back_counts_and_begins_afresh():
    guard = trained(40)
    past = DivergenceGuard(**json.loads(json.dumps(asdict(guard))))
    assert past == guard
    for _ in range(IN_A_ROW):
        guard.reason_to_skip(math.inf, 1.0)
    after = guard.rolled_back(past)
    assert after.rollbacks == 1 and not after.has_diverged and after.norms == past.norms
    assert after.rolled_back(past).rollbacks == 2
