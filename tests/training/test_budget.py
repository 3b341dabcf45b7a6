"""How long a run is: by steps, by epochs, or until a deadline, told by a clock of our own."""

from dataclasses import replace

import pytest

from minillm.config.train import TrainConfig
from minillm.optim.schedule import Schedule
from minillm.training import budget as step_budget
from minillm.training.budget import StepBudget, requested_steps

# The clock is looked at whether or not anything is logged.
LIMITED = TrainConfig(time_limit=100.0, warmup=0, log_every=100_000)


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(step_budget.time, "perf_counter", lambda: now[0])
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
    assert requested_steps(TrainConfig(batch_size=8, **settings), Windows()) == steps


def train(budget, clock, step_s, schedule=None, step=0) -> tuple[Schedule, int, list[float]]:
    """Steps of step_s(step) seconds to the end of the schedule, and their learning rates."""
    schedule = schedule or budget.schedule()
    rates = []
    while step < schedule.steps:
        rates.append(schedule.learning_rate(step))
        clock[0] += step_s(step)
        step += 1
        schedule = budget.adjusted(schedule, step)
    return schedule, step, rates


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
    budget = StepBudget(LIMITED, None, 0.0, guess_s)
    schedule, step, rates = train(budget, clock, SPEEDS[speed])
    # The last step begins before the deadline or is the one that closes the schedule.
    longest = max(SPEEDS[speed](s) for s in range(step - 2, step))
    assert 100 - 3 * longest - 2 < clock[0] - 1000 <= 100 + 2 * longest
    assert schedule.steps == step
    # The schedule came down to its end, and never went up.
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == LIMITED.learning_rate
    assert schedule.learning_rate(step) == pytest.approx(LIMITED.min_learning_rate)
    assert rates[-1] < 0.2 * LIMITED.learning_rate


def test_the_recorded_knots_are_the_rates_that_were_taken(clock):
    budget = StepBudget(LIMITED, None, 0.0, 0.3)
    schedule, step, rates = train(budget, clock, SPEEDS["slower in the middle"])
    assert len(schedule.pace) > 3  # it was decided anew on the way
    recorded = replace(budget.schedule(), pace=schedule.pace)
    assert [recorded.learning_rate(s) for s in range(step)] == pytest.approx(rates, rel=1e-12)


def test_the_time_of_earlier_processes_counts(clock):
    budget = StepBudget(LIMITED, None, 60.0, 0.5)
    assert budget.trained_s == 60.0
    assert budget.affordable(30, 0.5) == 30 + 80
    _, _, _ = train(budget, clock, SPEEDS["steady"], budget.schedule(30), step=30)
    assert 38 <= clock[0] - 1000 <= 41


def test_steps_bound_a_limited_run(clock):
    budget = StepBudget(replace(LIMITED, steps=20), 20, 0.0, 0.5)
    schedule, step, _ = train(budget, clock, SPEEDS["steady"])
    assert step == schedule.steps == 20 and clock[0] - 1000 == 10


def test_without_a_limit_the_clock_decides_nothing(clock):
    budget = StepBudget(TrainConfig(steps=20, warmup=0), 20, 0.0, 0.5)
    schedule, step, _ = train(budget, clock, lambda step: 1000.0)
    assert step == 20 and schedule.pace == ((0, 0.0), (20, 1.0))


def test_small_changes_of_the_estimate_change_nothing(clock):
    budget = StepBudget(LIMITED, None, 0.0, 0.5)
    schedule, _, _ = train(budget, clock, SPEEDS["steady"])
    assert len(schedule.pace) == 2


def test_there_is_always_one_step(clock):
    budget = StepBudget(LIMITED, None, 0.0, guess_s=1e9)
    assert budget.schedule().steps == 1


def test_the_clock_is_looked_at_soon_and_then_now_and_again(clock, monkeypatch):
    """After 1, 2, 4, ... steps beyond the first, then every CHECK_S: not after each step."""
    looks = []
    whole = StepBudget.affordable

    def affordable(budget, step, step_s):
        looks.append(step)
        return whole(budget, step, step_s)

    budget = StepBudget(LIMITED, None, 0.0, 0.01)
    schedule = budget.schedule()
    monkeypatch.setattr(StepBudget, "affordable", affordable)
    train(budget, clock, lambda step: 0.01, schedule)
    assert looks[:6] == [2, 3, 5, 9, 17, 33]
    gaps = [b - a for a, b in zip(looks, looks[1:], strict=False)]
    assert max(gaps) <= step_budget.CHECK_S / 0.01 + 1 and len(looks) < 70
