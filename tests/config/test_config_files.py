"""The settings of a run, given once more: to go on with it, or to repeat it with one change.

What was asked for and what came of it are two things. A run is what it is by either name.
"""

import json
import shutil
from pathlib import Path

import pytest

from minillm.commands import prepare
from minillm.config.presets import PRESETS
from minillm.config.resolve import resolve
from minillm.runtime.files import read_json
from minillm.runtime.program import run as ending
from minillm.scripts import train as script
from tests.config.test_resolve import parse, settle
from tests.support.broad import broad


@pytest.fixture
def printed(train, capfd):
    """printed(*flags): the settings that train.py prints."""

    def run(*flags):
        capfd.readouterr()
        assert train(*flags, "--print-config") == 0
        return json.loads(capfd.readouterr().out)

    return run


@pytest.fixture(scope="module")
def bpe_flags(tmp_path_factory) -> list:
    """Flags that ask for more tokens than the text supports."""
    cache = tmp_path_factory.mktemp("cache")
    return ["--tokenizer", "bpe", "--vocab-size", "2000", "--cache-dir", cache, "--steps", "2"]


# -- the way back ---------------------------------------------------------------------------------


@broad("name", PRESETS, quick=4)
def test_a_printed_preset_and_a_flag_are_that_preset_and_the_flag(tmp_path, name):
    """What follows from others is no wish: it follows what the command line changes, too."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps(settle("--preset", name).flat()))
    for flags in (
        ["--learning-rate", "1e-4"],
        ["--n-head", "8", "--d-model", "512"],
        ["--recurrent", "0,1,1", "--mean-recurrence", "3"],
        ["--epochs", "2"],
        ["--preset", "tiny"],
        ["--preset", "small-recurrent", "--steps", "3"],
    ):
        if "--recurrent" in flags and "nanogpt" in name:
            continue  # huginn needs RMSNorm
        ours = settle(*flags, file=file, preset="nano")
        preset = [] if "--preset" in flags else ["--preset", name]
        assert ours.flat() == settle(*preset, *flags).flat()


def test_what_a_file_changed_of_its_preset_stays_under_another(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(
        json.dumps(settle("--preset", "nano", "--seed", "7", "--dropout", "0.1").flat())
    )
    ours = settle("--preset", "tiny", file=file, preset="nano")
    assert ours.flat() == settle("--preset", "tiny", "--seed", "7", "--dropout", "0.1").flat()
    assert ours.given == {"preset", "seed", "dropout"}
    # A file of few settings is meant as it says.
    file.write_text('{"preset": "nano", "n_layer": 4}')
    assert settle("--preset", "tiny", file=file).model.n_layer == 4


# -- a run's config.json --------------------------------------------------------------------------

MADE = {
    "plain": ["--seed", "3"],
    "core": ["--recurrent", "0,1,0", "--mean-recurrence", "2"],
    "lengths": ["--epochs", "0.02", "--warmup", "2", "--learning-rate", "0.002"],
}


@pytest.mark.parametrize("name", MADE)
def test_a_runs_config_json_repeats_it(train, printed, tmp_path, name):
    flags = MADE[name]
    assert train("--out", tmp_path / "run", *flags) == 0
    stated = tmp_path / "run" / "config.json"
    config = tmp_path / "printed.json"
    config.write_text(json.dumps(first := printed(*flags)))
    none = {"--data": None}  # nothing but the file
    for file in (stated, config):
        assert (
            resolve(parse(), str(file), None).flat() | none
            == resolve(parse(), str(config), None).flat() | none
        )
    assert {k: v for k, v in resolve(parse(), str(stated), None).flat().items() if v is not None} \
        == first  # fmt: skip


def test_a_run_is_repeated_with_one_change(tmp_path, tiny_run):
    stated = tiny_run / "config.json"
    same, other = (resolve(parse(*flags), str(stated), None) for flags in
                   ([], ["--learning-rate", "0.01"]))  # fmt: skip
    assert same.train.out is None and same.model.vocab_size is None  # not asked for
    assert other.train.learning_rate == 0.01
    assert other.train.min_learning_rate == pytest.approx(0.01 / 50)  # nano's share
    differ = {k for k, v in same.flat().items() if other.flat()[k] != v}
    assert differ == {"learning_rate", "min_learning_rate"}


def test_a_run_that_began_with_weights_is_repeated(train, printed, tmp_path, tiny_run):
    flags = ["--init-from", tiny_run, "--steps", "1"]
    assert train("--out", tmp_path / "a", *flags) == 0
    config = tmp_path / "printed.json"
    config.write_text(json.dumps(printed(*flags)))
    for number, file in enumerate((config, tmp_path / "a" / "config.json")):
        words = ["--config", str(file), "--out", str(tmp_path / f"b{number}")]
        assert ending("train.py", script.main, words) == 0
    config.write_text(json.dumps(json.loads(config.read_text()) | {"d_model": 32}))
    assert ending("train.py", script.main, ["--config", str(config)]) == 2


def test_a_flag_takes_along_what_the_file_says_of_its_former_value(tmp_path):
    """The vocabulary of another tokenizer, and the number of blocks of another core."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps(settle("--vocab-size", "2000", "--n-layer", "2").flat()))
    assert settle("--tokenizer", "byte", file=file).model.vocab_size is None
    assert settle("--recurrent", "1,1,1", file=file).model.n_layer == 3
    assert settle("--tokenizer", "bpe", "--seed", "1", file=file).model.vocab_size == 2000


def test_the_same_settings_with_the_weights_of_a_run_are_taken(train, tmp_path, bpe_flags):
    run = tmp_path / "run"
    assert train("--out", run, *bpe_flags) == 0
    words = ["--config", run / "config.json", "--init-from", run, "--out", tmp_path / "more"]
    assert ending("train.py", script.main, [str(word) for word in words]) == 0


# -- a wish and its outcome -----------------------------------------------------------------------


def test_the_flags_of_the_first_start_are_taken_on_resume(train, tmp_path, bpe_flags, text_file):
    run = tmp_path / "run"
    assert train("--out", run, *bpe_flags) == 0
    made = read_json(run / "config.json")["model"]["vocab_size"]
    assert made < 2000
    again = [*bpe_flags[:-2], "--n-layer", "1", "--learning-rate", "0.05", "--data", text_file]
    for steps, more in ((3, ["--out", run]), (4, ["--dtype", "fp32", "--micro-batch-size", "4"])):
        assert train("--resume", run, *again, *more, "--steps", steps) == 0
    again[again.index("2000")] = str(made)
    assert train("--resume", run, *again, "--steps", "5") == 0
    again[again.index(str(made))] = "300"
    assert train("--resume", run, *again, "--steps", "6") == 2
    assert train("--resume", run, "--out", tmp_path / "other") == 2


def test_a_prepared_folder_is_taken_by_the_size_that_it_was_asked_for(
    train, tmp_path, bpe_flags, text_file
):
    """And goes on where the folder and the run have been moved to."""
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    words = [str(text_file), "--vocab-size", "2000", "--out", str(corpus)]
    assert ending("minillm prepare", prepare.main, words) == 0
    assert train("--data", corpus, "--vocab-size", "2000", "--out", run, "--steps", "2") == 0
    moved = Path(shutil.move(corpus, tmp_path / "elsewhere"))
    run = Path(shutil.move(run, tmp_path / "another"))
    size = ["--vocab-size", "2000"]
    for steps, more in ((3, []), (4, size)):
        assert train("--resume", run, "--data", moved, *more, "--steps", steps) == 0
    # The text itself, which is prepared once more, is the same corpus.
    cache = ["--cache-dir", tmp_path / "new"]
    assert train("--resume", run, "--data", text_file, *cache, "--steps", "5") == 0
    assert train("--data", moved, "--vocab-size", "300", "--out", tmp_path / "no") == 2


def test_a_tokenizers_file_may_have_moved(train, tmp_path, tiny_run):
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    shutil.copy(tiny_run / "tokenizer.json", one)
    run = tmp_path / "run"
    assert train("--out", run, "--tokenizer", one, "--steps", "2") == 0
    one.rename(other)
    assert train("--resume", run, "--tokenizer", other, "--steps", "3") == 0
