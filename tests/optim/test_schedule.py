"""The learning rate as a function of the step: closed forms, ends, and changes of pace."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from minillm.config.presets import PRESETS
from minillm.config.train import SCHEDULES
from minillm.optim.schedule import plain
from tests.support.broad import broad

PEAK, LOW, WARM, STEPS = 3e-3, 2e-4, 10, 110


def rates(schedule, steps=STEPS):
    return [schedule.learning_rate(s) for s in range(steps + 1)]


def by_hand(kind, step):
    if step < WARM:
        return PEAK * (step + 1) / (WARM + 1)
    x = (step - WARM) / (STEPS - WARM)
    if kind == "cosine":
        return LOW + (PEAK - LOW) * 0.5 * (1 + math.cos(math.pi * x))
    if kind == "linear":
        return PEAK * (1 - x) + LOW * x
    if kind == "wsd":
        p = step / STEPS  # of the whole run, of which the last quarter decays
        return PEAK if p < 0.75 else PEAK + (LOW - PEAK) * (p - 0.75) / 0.25
    return PEAK


@pytest.mark.parametrize("kind", SCHEDULES)
def test_closed_forms(kind):
    schedule = plain(kind, PEAK, LOW, WARM, 0.25, STEPS)
    assert schedule.steps == STEPS
    assert rates(schedule) == pytest.approx([by_hand(kind, s) for s in range(STEPS + 1)], rel=1e-12)
    assert schedule.learning_rate(WARM) == PEAK
    end = PEAK if kind == "constant" else LOW
    assert schedule.learning_rate(STEPS) == pytest.approx(end, rel=1e-12)
    assert schedule.learning_rate(STEPS + 50) == pytest.approx(end, rel=1e-12)


SCHEDULES = st.builds(
    lambda kind, peak, low, warmup, fraction, steps: plain(
        kind, peak, peak * low, warmup, fraction, steps
    ),
    kind=st.sampled_from(SCHEDULES),
    peak=st.floats(1e-5, 1),
    low=st.floats(0, 1),
    warmup=st.integers(0, 60),
    fraction=st.floats(1e-3, 1),
    steps=st.integers(1, 300),
)


@given(SCHEDULES)
def test_up_then_down_within_bounds(schedule):
    values = rates(schedule, schedule.steps + 5)
    top = schedule.warmup
    hair = 1e-12 * schedule.peak
    assert all(b >= a for a, b in pairwise(values[: top + 1]))
    assert all(b <= a + hair for a, b in pairwise(values[top:]))
    low = min(schedule.minimum, schedule.peak / (schedule.warmup + 1))
    assert all(low - hair <= v <= schedule.peak + hair for v in values)
    assert values[0] > 0


@given(SCHEDULES.filter(lambda s: s.steps > s.warmup + 1))
def test_no_jump_between_steps(schedule):
    span = schedule.steps - schedule.warmup
    steepest = {
        "cosine": math.pi / 2 / span,
        "linear": 1 / span,
        "wsd": 1 / schedule.decay_fraction / span,
        "constant": 0.0,
    }[schedule.kind]
    drop = max(a - b for a, b in pairwise(rates(schedule, schedule.steps + 5)))
    allowed = (schedule.peak - schedule.minimum) * steepest
    assert drop <= allowed * (1 + 1e-9) + 1e-12 * schedule.peak


@settings(max_examples=40)
@given(SCHEDULES, st.lists(st.tuples(st.integers(0, 350), st.integers(1, 500)), max_size=5))
def test_a_new_pace_keeps_the_past_and_ends_in_time(schedule, changes):
    for step, steps in sorted(changes):
        repaced = schedule.repaced(step, steps)
        assert repaced.steps == max(steps, step + 1)
        for s in range(step):
            assert repaced.learning_rate(s) == pytest.approx(schedule.learning_rate(s), rel=1e-9)
            assert repaced.progress(s) == pytest.approx(schedule.progress(s), rel=1e-9)
        assert repaced.progress(step) == pytest.approx(schedule.progress(step) if step else 0.0)
        assert repaced.progress(repaced.steps) == pytest.approx(1.0, abs=1e-12)
        line = [repaced.progress(s) for s in range(repaced.steps + 3)]
        assert line[0] == 0.0 and line[-1] == pytest.approx(1.0, abs=1e-12)
        assert all(0 <= a <= b + 1e-12 and b <= 1 for a, b in pairwise(line))
        end = repaced.peak if repaced.kind == "constant" else repaced.minimum
        if repaced.steps > repaced.warmup and repaced.progress(repaced.warmup) < 1 - 1e-9:
            reached = repaced.learning_rate(repaced.steps)
            assert reached == pytest.approx(end, abs=1e-9 * repaced.peak)
        schedule = repaced


def test_a_new_pace_goes_on_where_the_old_one_stood():
    schedule = plain("linear", 1.0, 0.0, 0, 0.2, 100).repaced(50, 60)
    assert schedule.learning_rate(49) == pytest.approx(0.51)
    assert schedule.learning_rate(50) == pytest.approx(0.5)
    assert schedule.learning_rate(55) == pytest.approx(0.25)
    assert schedule.learning_rate(60) == 0.0
    slower = schedule.repaced(55, 155)
    assert slower.learning_rate(105) == pytest.approx(0.125)
    assert slower.learning_rate(52) == pytest.approx(0.4)
    assert plain("linear", 1.0, 0.0, 0, 0.2, 100).repaced(0, 10) == plain(
        "linear", 1.0, 0.0, 0, 0.2, 10
    )


@pytest.mark.parametrize("warmup", [0, 30, 60])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_wsd_decays_the_documented_share_of_the_whole_run(warmup, fraction):
    """The warm-up is a part of the run: it shortens the plateau, and the decay if none is left."""
    schedule = plain("wsd", 1.0, 0.0, warmup, fraction, 100)
    decaying = [s for s in range(warmup, 101) if schedule.learning_rate(s) < 1.0]
    assert len(decaying) == min(100 * fraction, 100 - warmup)
    assert decaying[-1] == 100 and schedule.learning_rate(100) == pytest.approx(0.0, abs=1e-12)
    falls = [schedule.learning_rate(s - 1) - schedule.learning_rate(s) for s in decaying]
    assert falls == pytest.approx([1 / len(decaying)] * len(decaying))


def test_a_run_shorter_than_its_warmup_only_warms_up():
    schedule = plain("cosine", 1.0, 0.1, 100, 0.2, 20)
    assert rates(schedule, 19) == pytest.approx([(s + 1) / 101 for s in range(20)])
    assert schedule.learning_rate(100) <= 1.0


@broad("name", ["nanogpt-char-cpu", "nanogpt-char", "nanogpt-124m"], quick=2)
def test_nanogpt_presets_have_its_rates(name):
    p = PRESETS[name]
    ours = plain(
        p["schedule"], p["learning_rate"], p["min_learning_rate"], p["warmup"], 0.2, p["steps"]
    )

    def theirs(it):  # nanoGPT's train.py in words: warm-up, cosine to the end, then the minimum
        if it < p["warmup"]:
            return p["learning_rate"] * (it + 1) / (p["warmup"] + 1)
        if it > p["steps"]:
            return p["min_learning_rate"]
        ratio = (it - p["warmup"]) / (p["steps"] - p["warmup"])
        rise = p["learning_rate"] - p["min_learning_rate"]
        return p["min_learning_rate"] + rise * 0.5 * (1.0 + math.cos(math.pi * ratio))

    for it in range(0, p["steps"] + 10, 7):
        assert ours.learning_rate(it) == pytest.approx(theirs(it), rel=1e-9)
