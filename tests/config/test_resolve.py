"""From a command line and a file to settings: precedence, strict types, refusals, the way back."""

import json
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import strategies as st

from minillm.config import config_files, resolve as resolving
from minillm.config.flags import ALIASES, Settings, add_flags
from minillm.config.presets import PRESETS
from minillm.config.resolve import read_config, resolve, resumed_settings
from minillm.config.train import ModelConfig, TrainConfig
from minillm.errors import UsageError
from minillm.runtime import cli
from tests.support.broad import searched


@cache
def flags_parser():
    parser = cli.Parser(prog="train.py", aliases=ALIASES)
    add_flags(parser)
    return parser


def parse(*argv):
    return vars(flags_parser().parse(argv))


def settle(*argv, file=None, preset=None):
    return resolve(parse(*argv), str(file) if file else None, preset)


def config_file(tmp_path, text, name="run.toml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# -- precedence -----------------------------------------------------------------------------------


def test_precedence(tmp_path):
    file = config_file(tmp_path, "n_layer = 7\nn_head = 8\n")
    assert settle().model.n_layer == 6  # the default
    assert settle("--preset", "nanogpt-char-cpu").model.n_layer == 4
    assert settle("--preset", "nanogpt-char-cpu", file=file).model.n_layer == 7
    both = settle("--preset", "nanogpt-char-cpu", "--n-layer", "3", file=file)
    assert (both.model.n_layer, both.model.n_head, both.model.d_model) == (3, 8, 128)
    assert both.given == {"preset", "n_layer", "n_head"}


def test_where_the_preset_comes_from(tmp_path):
    file = config_file(tmp_path, 'preset = "tiny"\n')
    assert settle(preset="nano").train.preset == "nano"
    assert settle(preset="nano").given == set()
    assert settle(file=file, preset="nano").train.preset == "tiny"
    last = settle("--preset", "small", file=file, preset="nano")
    assert last.train.preset == "small" and last.model.n_layer == 12


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_arrives_whole(name):
    flat = settle("--preset", name).flat()
    assert {n: flat[n] for n in PRESETS[name]} == pytest.approx(PRESETS[name])


def test_booleans_both_ways():
    assert settle("--qk-norm").model.qk_norm is True
    assert settle("--qk-norm", "false", "--preset", "nano").model.qk_norm is False
    assert settle("--no-qk-norm", "--preset", "nano").model.qk_norm is False
    assert settle("--preset", "nano").model.qk_norm is True
    assert settle("--qk-norm=yes").model.qk_norm is True


def test_what_the_user_says_of_the_length_replaces_the_presets(tmp_path):
    def length(*argv, **options):
        train = settle(*argv, **options).train
        return train.steps, train.epochs, train.time_limit

    nano = PRESETS["nano"]
    assert length("--preset", "nano") == (nano["steps"], None, nano["time_limit"])
    assert length("--preset", "nano", "--steps", "5") == (5, None, None)
    assert length("--preset", "nano", "--epochs", "2") == (None, 2.0, None)
    assert length("--preset", "nano", "--time-limit", "10m") == (None, None, 600.0)
    assert length("--steps", "5", "--time-limit", "1h") == (5, None, 3600.0)
    file = config_file(tmp_path, "epochs = 3\n")
    assert length("--preset", "nano", file=file) == (None, 3.0, None)
    assert length("--preset", "nano", "--steps", "9", file=file) == (9, None, None)
    with pytest.raises(UsageError, match="steps and epochs exclude each other"):
        settle("--steps", "5", "--epochs", "2")


def test_the_lowest_rate_follows_the_peak(tmp_path):
    def rates(*argv, **options):
        train = settle(*argv, **options).train
        return train.learning_rate, train.min_learning_rate

    assert rates("--learning-rate", "5e-5") == pytest.approx((5e-5, 5e-6))
    assert rates("--learning-rate", "1e-3", "--preset", "nano") == pytest.approx((1e-3, 2e-5))
    assert rates("--learning-rate", "1e-3", "--min-learning-rate", "5e-4") == (1e-3, 5e-4)
    file = config_file(tmp_path, "learning-rate = 1e-4\n")
    assert rates("--preset", "nano", file=file) == pytest.approx((1e-4, 2e-6))
    assert rates("--preset", "nano", "--learning-rate", "0")[1] == 0
    with pytest.raises(UsageError, match="min_learning_rate 0.1 is above learning_rate 0.01"):
        settle("--learning-rate", "0.01", "--min-learning-rate", "0.1")


# -- files ----------------------------------------------------------------------------------------

GOOD = [
    ("run.toml", "n_layer = 3\nlearning-rate = 1\nbias = true\n"),
    ("run.json", '{"n-layer": 3, "learning_rate": 1, "bias": true}'),
    ("run.json", '\ufeff{"n-layer": 3, "learning_rate": 1.0, "bias": true}'),
    ("run.toml", "\ufeffn_layer = 3\nlearning_rate = 1.0\nbias = true"),
    ("run.json", '{"n-layer": 3, "learning_rate": 1, "bias": true, "d_ff": null}'),
]


@pytest.mark.parametrize("name, text", GOOD)
def test_files(tmp_path, name, text):
    values = read_config(config_file(tmp_path, text, name))
    assert values == {"n_layer": 3, "learning_rate": 1.0, "bias": True}
    assert type(values["learning_rate"]) is float


def test_files_understand_aliases_whole_numbers_and_durations(tmp_path):
    text = 'block_size = 64\nn-embd = 32\nmax_iters = 9\nthreads = 2\ntime-limit = "2m"\n'
    assert read_config(config_file(tmp_path, text)) == {
        "seq_len": 64,
        "d_model": 32,
        "steps": 9,
        "threads": "2",
        "time_limit": 120.0,
    }
    assert read_config(config_file(tmp_path, "time_limit = 90")) == {"time_limit": 90.0}
    assert read_config(config_file(tmp_path, "")) == {}


DEEP = 100_000
BAD = [
    ("a.json", '{"n_layer": "12"}', 'n_layer = "12" is a str, expected a whole number'),
    ("a.json", '{"n_layer": true}', "n_layer = true is a bool, expected a whole number"),
    ("a.json", '{"n_layer": 12.0}', "n_layer = 12.0 is a float, expected a whole number"),
    ("a.json", '{"n_layer": [12]}', "is a list, expected a whole number"),
    ("a.json", '{"n_layer": {"a": 1}}', "is a dict, expected a whole number"),
    ("a.json", '{"bias": 1}', "bias = 1 is a int, expected true or false"),
    ("a.json", '{"bias": "true"}', "is a str, expected true or false"),
    ("a.json", '{"learning_rate": "1e-3"}', "is a str, expected a number"),
    ("a.json", '{"learning_rate": false}', "is a bool, expected a number"),
    ("a.json", '{"learning_rate": NaN}', "NaN is not a finite number"),
    ("a.json", '{"learning_rate": -Infinity}', "-Infinity is not a finite number"),
    ("a.json", '{"learning_rate": 1e999}', "not a finite number"),
    ("a.json", '{"learning_rate": ' + "9" * 400 + "}", "not a finite number"),
    ("a.json", '{"n_layer": ' + "9" * 400 + "}", "is out of range"),
    ("a.json", '{"n_layer": ' + "9" * 5000 + "}", "a.json: "),
    ("a.json", '{"n_layer": 0}', "n_layer: 0 is out of range"),
    ("a.json", '{"data": 7}', "data = 7 is a int, expected text"),
    ("a.json", '{"position": "learnt"}', "'learnt' is not one of"),
    ("a.json", '{"position": 3}', "is a int, expected text"),
    ("a.json", '{"time_limit": "soon"}', "time_limit: 'soon' is not a duration"),
    ("a.json", '{"time_limit": true}', "is a bool"),
    ("a.json", '{"threads": true}', "is a bool"),
    ("a.json", '{"n_layers": 3}', "unknown setting 'n_layers'; did you mean n_layer?"),
    ("a.json", '{"zzzzzzzz": 3}', "unknown setting 'zzzzzzzz'"),
    ("a.json", '{"bos_id": 3}', "unknown setting 'bos_id'"),
    ("a.json", '{"": 3}', "unknown setting ''"),
    ("a.json", '{"n_layer": 3, "n_layer": 4}', "'n_layer' is given twice"),
    ("a.json", '{"n_layer": 3, "n-layer": 4}', "n_layer is given twice"),
    ("a.json", '{"seq_len": 3, "block_size": 4}', "seq_len is given twice"),
    ("a.json", "[1, 2]", "expected one table of settings, got list"),
    ("a.json", "3", "expected one table of settings, got int"),
    ("a.json", "null", "expected one table of settings, got NoneType"),
    ("a.json", "", "a.json: Expecting value"),
    ("a.json", '{"n_layer": 3', "a.json: Expecting"),
    ("a.json", "{} {}", "a.json: Extra data"),
    ("a.json", "[" * DEEP + "]" * DEEP, "nested too deeply"),
    ("a.json", '{"a":' * DEEP + "1" + "}" * DEEP, "nested too deeply"),
    ("a.json", b"\x80\x00\xff", "not UTF-8 text at byte 0"),
    ("a.json", '{"n_layer": 3}'.encode("utf-16"), "not UTF-8 text at byte 0"),
    ("a.json", b'{"out": "caf\xe9"}', "not UTF-8 text at byte 12"),
    ("a.json", b"\x00" * 50, "a.json: Expecting value"),
    ("a.json", b" " * (1 << 20) + b"{}", "larger than 1 MiB"),
    ("a.toml", "n_layer = 3\nn_layer = 4\n", "a.toml: "),
    ("a.toml", "n_layer = 3\nn-layer = 4\n", "n_layer is given twice"),
    ("a.toml", "learning_rate = nan", "'nan' is not a finite number"),
    ("a.toml", "learning_rate = inf", "'inf' is not a finite number"),
    ("a.toml", "n_layer = 1979-05-27", 'n_layer = "1979-05-27" is a date, expected a whole number'),
    ("a.toml", "[model]\nn_layer = 3", "unknown setting 'model'"),
    ("a.toml", "n_layer = [3]", "is a list, expected a whole number"),
    ("a.toml", "n_layer 3", "a.toml: "),
    ("a.toml", b"\xff\xfe\x00", "not UTF-8 text at byte 0"),
    ("a.toml", "n_layer = " + "[" * DEEP + "]" * DEEP, "nested too deeply"),
    ("a.yaml", "n_layer: 3", "expected a .toml or .json file"),
    ("a", "n_layer = 3", "expected a .toml or .json file"),
]


@pytest.mark.parametrize("name, text, message", BAD, ids=lambda x: str(x)[:30])
def test_refused_files(tmp_path, name, text, message):
    path = config_file(tmp_path, text, name)
    with pytest.raises(UsageError) as refusal:
        settle(file=path)
    assert message in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_files_that_are_not_there(tmp_path):
    for path, what in ((tmp_path / "none.toml", "no such file"), (tmp_path, "not a regular file")):
        with pytest.raises(UsageError, match=what):
            settle(file=path)


# -- the way back ---------------------------------------------------------------------------------


def there_and_back(settings, path):
    path.write_text(json.dumps(settings.flat()))
    return resolve(parse(), str(path), "nano")


@pytest.mark.parametrize("name", PRESETS)
def test_printed_settings_read_back_the_same(tmp_path, name):
    settings = settle("--preset", name)
    back = there_and_back(settings, tmp_path / "printed.json")
    assert (back.model, back.train) == (settings.model, settings.train)


VALUES = {
    "preset": st.sampled_from(sorted(PRESETS)),
    "n_layer": st.integers(1, 10000).map(str),
    "n_head": st.sampled_from(["4", "8"]),
    "n_kv_head": st.sampled_from(["1", "2"]),
    "d_model": st.integers(1, 99).map(lambda n: str(480 * n)),
    "vocab_size": st.integers(1, 1 << 24).map(str),
    "position": st.sampled_from(["rope", "alibi", "none"]),
    "rope_base": st.floats(1, 1e9).map(repr),
    "qk_norm": st.sampled_from(["true", "no"]),
    "tie_embeddings": st.just("no"),
    "data": st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).map(
        lambda s: "./" + s
    ),
    "learning_rate": st.floats(0, 10).map(repr),
    "steps": st.integers(1, 10**9).map(str),
    "time_limit": st.integers(1, 10**6).map(lambda n: f"{n}m"),
    "threads": st.sampled_from(["auto", "3"]),
    "seed": st.integers(0, 2**63 - 1).map(str),
    "compile": st.sampled_from(["true", "false"]),
}


@searched(25, 100, values=st.fixed_dictionaries({}, optional=VALUES))
def test_any_settings_read_back_the_same(tmp_path_factory, values):
    if values.get("preset", "").endswith("-recurrent"):
        for name in ("n_layer", "qk_norm"):  # may be refused beside the preset's own
            values.pop(name, None)
    path = tmp_path_factory.getbasetemp() / "any.json"
    settings = settle(*(f"--{name}={value}" for name, value in values.items()), preset="nano")
    assert isinstance(settings, Settings)
    back = there_and_back(settings, path)
    assert (back.model, back.train) == (settings.model, settings.train)
    assert back.flat() == settings.flat()


# -- resuming -------------------------------------------------------------------------------------


def resumed(*argv, model=None, train=None):
    model, train = model or ModelConfig(), train or TrainConfig(steps=100)
    return resumed_settings(model, train, settle(*argv))


def test_a_resumed_run_keeps_what_it_is():
    train = TrainConfig(steps=100, learning_rate=0.5, preset="nano")
    settings = resumed("--threads", "2", "--eval-every", "7", train=train)
    assert settings.model == ModelConfig()
    assert settings.train == replace(train, threads="2", eval_every=7)


def test_a_resumed_run_may_be_longer():
    assert resumed("--steps", "200").train.steps == 200
    timed = resumed("--time-limit", "1h").train
    assert (timed.steps, timed.time_limit) == (None, 3600.0)


def test_a_resumed_run_cannot_become_another():
    assert resumed("--n-layer", "6").model.n_layer == 6  # as it is
    for argv in (["--n-layer", "7"], ["--learning-rate", "0.1"], ["--tokenizer", "char"]):
        with pytest.raises(UsageError, match="cannot change on resume") as refusal:
            resumed(*argv)
        assert refusal.value.with_flags().startswith(argv[0])


def test_the_fields_of_settings_are_listed_once_and_not_for_every_flag(monkeypatch, tmp_path):
    calls = []
    for module in (resolving, config_files):
        fields = module.setting_fields
        monkeypatch.setattr(module, "setting_fields", lambda f=fields: calls.append(1) or f())
    flags = parse()
    resolve(flags, None, "nano")
    file = tmp_path / "all.json"
    file.write_text(json.dumps(resolve(flags, None, "nano").flat()))
    calls.clear()
    resolve(flags, str(file), "nano")
    assert len(calls) < 10
