"""Warnings that quote an error name its flags, because a person reads them on a terminal."""

from minillm.checkpoint import keep
from minillm.errors import CorruptError, DivergedError, parameter
from minillm.training import recovery, validation
from tests.training.test_recovery import FLAGS, Injector


def test_a_failed_evaluation_names_flags(train, tmp_path, monkeypatch, capfd):
    def failing(*args):
        raise DivergedError(f"try a smaller {parameter('seq_len')}")

    monkeypatch.setattr(validation, "evaluate", failing)
    train("--out", tmp_path / "run", "--steps", "1")
    assert "warning   step 1: try a smaller --seq-len\n" in capfd.readouterr().err


def test_a_bad_step_that_is_not_logged_names_flags(train, tmp_path, monkeypatch, capfd):
    def failing(*args):
        raise CorruptError(f"give {parameter('data')}")

    monkeypatch.setattr(recovery, "_append", failing)
    injected = Injector(lambda position: float("nan") if position == 2 else None)
    train("--out", tmp_path / "run", *FLAGS, steps=injected)
    assert "not kept: give --data\n" in capfd.readouterr().err


def test_an_error_in_words_names_flags():
    assert keep.in_words(CorruptError(f"give {parameter('data_order')}")) == "give --data-order"
    assert keep.in_words(ValueError("x")) == "x"
