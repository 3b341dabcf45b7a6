"""How long a resumed run is: more time is more time, and steps and epochs count from its start."""

import pytest

from minillm.checkpoint.find import open_checkpoint
from minillm.runtime.launch import World
from tests.support.broad import broad
from tests.system.test_train import metrics
from tests.training.test_stopping import Killed, killed, stepping

NO_EVALUATION = ["--eval-every", "0", "--val-fraction", "0"]


@pytest.fixture
def timed(train, tmp_path):
    """A finished run that was limited to half a second."""
    run = tmp_path / "run"
    assert train("--out", run, "--time-limit", "0.5s", *NO_EVALUATION) == 0
    return run


def state_of(run):
    return open_checkpoint(run).state


def test_a_time_limit_of_a_resumed_run_is_more_time(train, timed, capfd):
    before = state_of(timed)["progress"]
    capfd.readouterr()
    assert train("--resume", timed, "--time-limit", "0.4s") == 0
    assert "0 s more, " in (said := capfd.readouterr().err) and "s so far" in said
    after = state_of(timed)
    assert after["settings"]["time_limit"] == 0.4
    assert after["timed_from"] == before["trained_s"]
    assert after["progress"]["trained_s"] > before["trained_s"] + 0.3
    assert after["step"] > before["step"]
    # Without the flag nothing is added.
    assert train("--resume", timed) == 0
    assert f"is finished at step {after['step']}" in capfd.readouterr().err


def test_however_little_time_is_asked_for_there_is_a_step(train, timed):
    step = state_of(timed)["step"]
    assert train("--resume", timed, "--time-limit", "0.001s") == 0
    assert state_of(timed)["step"] == step + 1


@broad("again", [[], ["--time-limit", "0.6s"]])
def test_more_time_outlives_a_kill_and_is_granted_once_by_a_launch(train, timed, again):
    """Resumed by hand without the flag, or by torchrun, which repeats all flags."""
    before = state_of(timed)["progress"]["trained_s"]
    for attempt in (0, 1):
        world = World(attempt=attempt, launch="that one")
        words = again if attempt else ["--time-limit", "0.6s"]
        with pytest.raises(Killed):
            train("--resume", timed, *words, world=world, steps=stepping(killed))
        assert state_of(timed)["timed_from"] == before
    assert train("--resume", timed, *again, world=world) == 0
    state = state_of(timed)
    assert (state["timed_from"], state["settings"]["time_limit"]) == (before, 0.6)
    assert state["progress"]["trained_s"] > before + 0.4
    # Another launch is another wish.
    now, another = state_of(timed)["progress"]["trained_s"], World(launch="another")
    assert train("--resume", timed, "--time-limit", "0.1s", world=another) == 0
    assert state_of(timed)["timed_from"] == now


def test_a_config_file_that_names_the_first_length_adds_none(train, timed, tmp_path, capfd):
    file = tmp_path / "a.toml"
    file.write_text("time-limit = 0.5\n")
    assert train("--resume", timed, "--config", file) == 0
    assert "is finished at step" in capfd.readouterr().err


def test_an_early_stop_may_be_gone_beyond(train, tmp_path, capfd):
    """With a rate of 0 nothing is ever gained after the first evaluation."""
    run = tmp_path / "run"
    flags = ["--learning-rate", "0", "--steps", "40", "--eval-every", "3", "--early-stop", "2"]
    assert train("--out", run, *flags) == 0 and max(metrics(run)) == 9
    capfd.readouterr()
    for steps, end in (("60", 15), ("80", 21)):
        assert train("--resume", run, "--steps", steps) == 0 and max(metrics(run)) == end
        assert "stopping early: 2 evaluations without gain" in capfd.readouterr().err
    # Who asks for nothing more gets nothing more, however often.
    for _ in range(2):
        assert train("--resume", run) == 0 and max(metrics(run)) == 21
        said = capfd.readouterr().err.splitlines()[-1]
        assert f"{run} stopped early at step 21, after 2 evaluations without gain; " in said
    assert train("--resume", run, "--early-stop", "3") == 0 and max(metrics(run)) == 24
    assert "stopping early: 3 evaluations without gain" in capfd.readouterr().err


@pytest.mark.parametrize("flags", [["--steps", "8"], ["--steps", "3"], ["--epochs", "0.01"]])
def test_steps_that_are_done_already_are_said_to_be(train, tmp_path, capfd, flags):
    run = tmp_path / "run"
    assert train("--out", run, *NO_EVALUATION) == 0
    capfd.readouterr()
    assert train("--resume", run, *flags) == 0
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith(f"{run} is finished at step 8, and {' '.join(flags)} counts from its ")
    assert "N above 8" in said and "--time-limit" in said and state_of(run)["step"] == 8
