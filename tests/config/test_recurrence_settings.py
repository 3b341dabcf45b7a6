"""Settings of recurrent depth, from flags and files: what holds, what is refused, and where a run
that others start from has fixed it."""

import json
from pathlib import Path

import pytest

from minillm.config.resolve import recurrence_settings, resolve
from minillm.errors import UsageError
from minillm.flags.train import parser
from minillm.runtime.launch import World
from minillm.training.begin import begin


def parse(*argv):
    return parser().parse([str(word) for word in argv])


def settle(*argv, file=None, preset="nano"):
    return resolve(vars(parse(*argv)), file and str(file), preset)


def written(tmp_path, **settings) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(settings))
    return path


# Start weights.


@pytest.mark.parametrize("style", ["huginn", "parcae"])
def test_a_core_has_its_own_start_weights(tmp_path, style):
    """A preset's, tuned for fixed depth, give way; the user's do not."""
    core = ("--recurrent", "1,1,1", "--recurrence-style", style)
    other = ("--preset", "nanogpt-char-cpu", "--norm", "rmsnorm")
    assert settle(*other).model.init == settle(preset=None).model.init == "gpt2"
    assert settle(*other, *core).model.init == settle(*core, preset=None).model.init == "takase"
    assert settle(file=written(tmp_path, recurrent="1,1,1")).model.init == "takase"
    assert settle(*core, "--init", "zero").model.init == "zero"
    assert settle(*core, file=written(tmp_path, init="gpt2")).model.init == "gpt2"
    assert settle("--preset", "nano-recurrent").model.init == "takase"
    assert settle(*core, "--preset", "tiny-recurrent").model.init == "takase"


# What means nothing.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--recurrence-curriculum",),
            "--recurrence-curriculum needs a recurrent model; add --rec",
        ),
        (("--recurrence-groups", "2"), "--recurrence-groups needs a recurrent model"),
        (("--mean-recurrence", "1"), "--mean-recurrence needs a recurrent model"),
        (("--recurrent", "1,1,1", "--n-layer", "4"), "--n-layer 4: --recurrent 1,1,1 has 3 blocks"),
        (
            ("--recurrent", "1,1,1", "--recurrence-style", "parcae", "--no-qk-norm"),
            "--qk-norm false: --recurrence-style parcae has QK-norm",
        ),
    ],
)
def test_flags_that_mean_nothing_are_refused(words, message):
    with pytest.raises(UsageError) as refusal:
        settle(*words)
    assert message in refusal.value.with_flags()


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        ({"recurrence_curriculum": True}, (), "run.json: recurrence_curriculum needs a recurrent"),
        ({"mean-recurrence": 5}, (), "run.json: mean_recurrence needs a recurrent model"),
        ({"n_layer": 4}, ("--recurrent", "1,1,1"), "run.json: n_layer 4: --recurrent 1,1,1 has 3"),
        ({"n_layer": 4, "recurrent": "1,1,1"}, (), "run.json: n_layer 4: --recurrent 1,1,1 has 3"),
        ({"n_layer": 3}, ("--preset", "nano-recurrent"), "run.json: n_layer 3: --recurrent 1,2,1"),
        (
            {"qk_norm": False}, ("--preset", "nano-recurrent"),
            "run.json: qk_norm false: --recurrence-style parcae has QK-norm",
        ),
    ],
)  # fmt: skip
def test_files_that_mean_nothing_are_refused(tmp_path, settings, flags, message):
    with pytest.raises(UsageError) as refusal:
        settle(*flags, file=written(tmp_path, **settings))
    assert message in refusal.value.with_flags()


def test_what_says_what_holds_anyhow_is_no_mistake(tmp_path):
    """As --print-config writes it of a model without a core, and of one with."""
    for words in ((), ("--preset", "nano-recurrent"), ("--recurrent", "1,2,1", "--no-qk-norm")):
        first = settle(*words)
        printed = {n: v for n, v in first.flat().items() if v is not None}
        assert settle(file=written(tmp_path, **printed)).flat() == first.flat()
        assert bool(recurrence_settings(printed)) == bool(words)
    assert settle("--recurrent", "1,1,1", "--n-layer", "3").model.n_layer == 3


# Started from another run.

CORE = ("--recurrent", "1,1,1", "--mean-recurrence", "2", "--max-recurrence", "5")


@pytest.fixture(scope="module")
def recurrent_run(train, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "core"
    assert train("--out", run, "--steps", "1", *CORE) == 0
    return run


def inherited(run, *flags):
    return begin(parse("--init-from", run, "--out", "nowhere", *flags), World())[0]


def depths(settings) -> tuple:
    c = settings.model
    return c.mean_recurrence, c.max_recurrence, c.backprop_depth


def test_how_often_a_core_runs_may_be_set_anew(recurrent_run):
    assert depths(inherited(recurrent_run)) == (2, 5, 5)
    assert depths(inherited(recurrent_run, "--mean-recurrence", "3")) == (3, 12, 12)
    assert depths(inherited(recurrent_run, "--mean-recurrence", "16")) == (16, 64, 8)
    assert depths(inherited(recurrent_run, "--max-recurrence", "7")) == (2, 7, 7)
    assert depths(inherited(recurrent_run, "--backprop-depth", "1")) == (2, 5, 1)
    of_preset = inherited(recurrent_run, "--preset", "nano-recurrent", "--max-recurrence", "3")
    assert depths(of_preset) == (2, 3, 3) and of_preset.model.recurrent == "1,1,1"
    given = ("--mean-recurrence", "4", "--max-recurrence", "6", "--backprop-depth", "2")
    settings = inherited(recurrent_run, *given, "--recurrence-groups", "2",
                         "--recurrence-curriculum")  # fmt: skip
    assert depths(settings) == (4, 6, 2) and settings.model.recurrent == "1,1,1"
    assert settings.train.recurrence_groups == 2 and settings.train.recurrence_curriculum
    with pytest.raises(UsageError, match="max_recurrence 1 is below mean_recurrence 2"):
        inherited(recurrent_run, "--max-recurrence", "1")


def test_it_trains_so(train, recurrent_run, tmp_path):
    flags = ("--mean-recurrence", "3", "--recurrence-groups", "2", "--steps", "1")
    assert train("--init-from", recurrent_run, "--out", tmp_path / "next", *flags) == 0
    told = json.loads((tmp_path / "next" / "config.json").read_text())
    assert (told["model"]["mean_recurrence"], told["train"]["recurrence_groups"]) == (3, 2)


def test_what_another_run_fixes_is_refused_without_a_circle(recurrent_run, tiny_run):
    """No refusal asks for a flag that the next one refuses."""
    for run in (recurrent_run, tiny_run):
        for flags in (("--injection", "add"), ("--recurrent", "1,2,1"), ("--n-layer", "4")):
            name = flags[0].removeprefix("--").replace("-", "_")
            with pytest.raises(UsageError, match=f"{name} cannot be set with init_from"):
                inherited(run, *flags)
    assert inherited(recurrent_run, "--recurrent", "1,1,1").model.recurrent == "1,1,1"
    for flags in (("--mean-recurrence", "5"), ("--recurrence-groups", "2"),
                  ("--recurrence-curriculum",)):  # fmt: skip
        name = flags[0].removeprefix("--").replace("-", "_")
        with pytest.raises(UsageError, match=f"{name} sets the recurrence; .* has no core"):
            inherited(tiny_run, *flags)
    assert inherited(tiny_run, "--recurrence-groups", "1").train == inherited(tiny_run).train
    with pytest.raises(UsageError, match="mean_recurrence 5 differs .* cannot change on resume"):
        begin(parse("--resume", tiny_run, "--mean-recurrence", "5"), World())
