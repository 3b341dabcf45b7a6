"""How long a run is: by steps, by epochs, or until a deadline, told by a clock of our own."""

from dataclasses import replace

import pytest

from minillm.config.train import TrainConfig
from minillm.optim.schedule import Schedule
from minillm.training import budget as pace
from minillm.training.budget import Pacer, wished_steps

# The clock is looked at whether or not anything is logged.
LIMITED = TrainConfig(time_limit=100.0, warmup=0, log_every=100_000)


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    return now


class Windows:
    n_windows = 100


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({"steps": 7}, 7),
        ({"steps": 7, "time_limit": 5.0}, 7),
        ({"epochs": 2.0}, 25),
        ({"epochs": 0.5, "time_limit": 5.0}, 7),
        ({}, 13),
        ({"time_limit": 5.0}, None),
        ({"epochs": 1e-6}, 1),
    ],
)
def test_the_steps_that_are_asked_for(settings, steps):
    assert wished_steps(TrainConfig(batch_size=8, **settings), Windows()) == steps


def train(pacer, clock, step_s, plan=None, step=0) -> tuple[Schedule, int, list[float]]:
    """Steps of step_s(step) seconds to the end of the plan, and the rates they were taken with."""
    plan = plan or pacer.schedule()
    rates = []
    while step < plan.steps:
        rates.append(plan.learning_rate(step))
        clock[0] += step_s(step)
        step += 1
        plan = pacer.keep_to_time(plan, step)
    return plan, step, rates


SPEEDS = {
    "steady": lambda step: 0.5,
    "slow start": lambda step: 8.0 if step == 0 else 0.5,
    "slower in the middle": lambda step: 0.5 if step < 80 else 1.5,
    "faster in the middle": lambda step: 0.5 if step < 80 else 0.2,
    "a stall": lambda step: 30.0 if step == 60 else 0.5,
    "thousands of steps": lambda step: 0.01 if step < 2000 else 0.03,
    "uneven": lambda step: 0.2 + 0.6 * (step * 7919 % 11) / 10,
}


@pytest.mark.parametrize("guess_s", [0.5, 0.05, 5.0])
@pytest.mark.parametrize("speed", SPEEDS)
def test_a_run_ends_on_its_deadline(clock, speed, guess_s):
    pacer = Pacer(LIMITED, None, 0.0, guess_s)
    plan, step, rates = train(pacer, clock, SPEEDS[speed])
    # The last step begins before the deadline or is the one that closes the schedule.
    longest = max(SPEEDS[speed](s) for s in range(step - 2, step))
    assert 100 - 3 * longest - 2 < clock[0] - 1000 <= 100 + 2 * longest
    assert plan.steps == step
    # The schedule came down to its end, and never went up.
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == LIMITED.learning_rate
    assert plan.learning_rate(step) == pytest.approx(LIMITED.min_learning_rate)
    assert rates[-1] < 0.2 * LIMITED.learning_rate


def test_the_recorded_knots_are_the_rates_that_were_taken(clock):
    pacer = Pacer(LIMITED, None, 0.0, 0.3)
    plan, step, rates = train(pacer, clock, SPEEDS["slower in the middle"])
    assert len(plan.pace) > 3  # it was decided anew on the way
    recorded = replace(pacer.schedule(), pace=plan.pace)
    assert [recorded.learning_rate(s) for s in range(step)] == pytest.approx(rates, rel=1e-12)


def test_the_time_of_earlier_processes_counts(clock):
    pacer = Pacer(LIMITED, None, 60.0, 0.5)
    assert pacer.trained_s == 60.0
    assert pacer.affordable(30, 0.5) == 30 + 80
    _, _, _ = train(pacer, clock, SPEEDS["steady"], pacer.schedule(30), step=30)
    assert 38 <= clock[0] - 1000 <= 41


def test_steps_bound_a_limited_run(clock):
    pacer = Pacer(replace(LIMITED, steps=20), 20, 0.0, 0.5)
    plan, step, _ = train(pacer, clock, SPEEDS["steady"])
    assert step == plan.steps == 20 and clock[0] - 1000 == 10


def test_without_a_limit_the_clock_decides_nothing(clock):
    pacer = Pacer(TrainConfig(steps=20, warmup=0), 20, 0.0, 0.5)
    plan, step, _ = train(pacer, clock, lambda step: 1000.0)
    assert step == 20 and plan.pace == ((0, 0.0), (20, 1.0))


def test_small_changes_of_the_estimate_change_nothing(clock):
    pacer = Pacer(LIMITED, None, 0.0, 0.5)
    plan, _, _ = train(pacer, clock, SPEEDS["steady"])
    assert len(plan.pace) == 2


def test_there_is_always_one_step(clock):
    pacer = Pacer(LIMITED, None, 0.0, guess_s=1e9)
    assert pacer.schedule().steps == 1


def test_the_clock_is_looked_at_soon_and_then_now_and_again(clock, monkeypatch):
    """After 1, 2, 4, ... steps beyond the first, then every LOOK_S: not after each of thousands."""
    looks = []
    whole = Pacer.affordable

    def affordable(pacer, step, step_s):
        looks.append(step)
        return whole(pacer, step, step_s)

    pacer = Pacer(LIMITED, None, 0.0, 0.01)
    plan = pacer.schedule()
    monkeypatch.setattr(Pacer, "affordable", affordable)
    train(pacer, clock, lambda step: 0.01, plan)
    assert looks[:6] == [2, 3, 5, 9, 17, 33]
    gaps = [b - a for a, b in zip(looks, looks[1:], strict=False)]
    assert max(gaps) <= pace.LOOK_S / 0.01 + 1 and len(looks) < 70
