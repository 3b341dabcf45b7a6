"""The flags of train.py, made from the configuration's fields: strict, and with all their names."""

from dataclasses import fields
from functools import cache

import pytest

from minillm.config.flags import ALIASES, Settings, add_flags
from minillm.config.train import ModelConfig, TrainConfig
from minillm.errors import UsageError
from minillm.runtime import cli


@cache
def flags_parser():
    parser = cli.Parser(prog="train.py", aliases=ALIASES)
    add_flags(parser)
    return parser


def parse(*argv):
    return vars(flags_parser().parse(argv))


def test_every_flag_is_a_field_and_every_field_a_flag():
    names = {f.name for owner in (ModelConfig, TrainConfig) for f in fields(owner) if f.metadata}
    assert names == set(parse()) - {"debug"}
    assert names == set(Settings(ModelConfig(), TrainConfig(), frozenset()).flat())
    assert all(value is None for name, value in parse().items() if name != "debug")


@pytest.mark.parametrize("alias, flag", ALIASES.items())
def test_nanogpts_names(alias, flag):
    name = flag[2:].replace("-", "_")
    for spelling in (alias, alias.replace("-", "_").replace("__", "--", 1)):
        assert parse(spelling, "7")[name] in (7, "7")
        assert parse(f"{spelling}=7")[name] in (7, "7")


def test_dashes_and_underscores():
    assert parse("--n_layer", "3")["n_layer"] == parse("--n-layer=3")["n_layer"] == 3
    assert parse("--no_qk_norm")["qk_norm"] is False
    assert parse("--out=my_run--a")["out"] == "my_run--a"


REFUSED = [
    (["--n-lay", "3"], "unknown flag --n-lay; did you mean --n-layer?"),
    (["--n-layers", "3"], "unknown flag --n-layers; did you mean --n-layer?"),
    (["--lerning-rate", "3"], "did you mean --learning-rate?"),
    (["--max-iter", "3"], "did you mean --max-iters?"),
    (["--zzzzzzzz"], "unknown flag --zzzzzzzz; see --help"),
    (["text.txt"], "unexpected argument 'text.txt'"),
    (["--n-layer", "3", "--n-layer", "4"], "--n-layer is given twice"),
    (["--n-layer", "3", "--n_layer=4"], "--n-layer is given twice"),
    (["--block-size", "3", "--seq-len", "4"], "--seq-len is given twice"),
    (["--bias", "--no-bias"], "--no-bias is given twice"),
    (["--n-layer"], "expected one argument"),
    (["--n-layer", "three"], "'three' is not a whole number"),
    (["--n-layer", "3.0"], "'3.0' is not a whole number"),
    (["--n-layer", ""], "'' is not a whole number"),
    (["--n-layer", "0"], "0 is out of range; expected between 1 and 10000"),
    (["--n-layer", "-1"], "-1 is out of range"),
    (["--n-layer", "9" * 400], "is out of range"),
    (["--n-layer", "9" * 5000], "is not a whole number"),
    (["--window", "-1"], "-1 is out of range; expected at least 0"),
    (["--learning-rate", "nan"], "'nan' is not a finite number"),
    (["--learning-rate", "inf"], "'inf' is not a finite number"),
    (["--learning-rate", "1e999"], "'1e999' is not a finite number"),
    (["--learning-rate", "-0.1"], "is out of range"),
    (["--learning-rate", "1e"], "'1e' is not a number"),
    (["--dropout", "1"], "1.0 is out of range; expected between 0 and 0.99"),
    (["--seed", str(2**63)], "is out of range"),
    (["--position", "rotary"], "'rotary' is not one of"),
    (["--position", "learnt"], "did you mean learned?"),
    (["--preset", "nanogpt"], "'nanogpt' is not one of"),
    (["--bias", "maybe"], "'maybe' is not true or false"),
    (["--no-bias", "true"], "unexpected argument 'true'"),
    (["--time-limit", "soon"], "'soon' is not a duration such as 90s, 10m or 2h"),
    (["--time-limit", "0"], "'0' is not a duration"),
    (["--time-limit", "-5"], "is not a duration"),
    (["--time-limit", "9" * 400], "is not a duration"),
]


@pytest.mark.parametrize("argv, message", REFUSED, ids=lambda x: str(x)[:40])
def test_refused_flags(argv, message):
    with pytest.raises(UsageError) as refusal:
        parse(*argv)
    assert message in refusal.value.with_flags()


TRAIN = {f.name for f in fields(TrainConfig)}
REFUSED_TOGETHER = [
    (["--threads", "0"], "--threads: 0 is out of range; expected between 1 and 4096, or auto"),
    (["--threads", "all"], "--threads: 'all' is not a whole number, or auto"),
    (["--micro-batch-size", "0"], "--micro-batch-size: 0 is out of range"),
    (
        ["--batch-size", "64", "--micro-batch-size", "65"],
        "--micro-batch-size: 65 is out of range; expected between 1 and 64",
    ),
    (
        ["--batch-size", "12", "--micro-batch-size", "5"],
        "--micro-batch-size 5 does not divide --batch-size 12; nearest: ",
    ),
    *(
        (["--early-stop", "2", flag, "0"], "--early-stop needs --eval-every and --val-fraction")
        for flag in ("--eval-every", "--val-fraction")
    ),
    (["--steps", "5", "--epochs", "2"], "--steps and --epochs exclude each other; give one"),
    (
        ["--learning-rate", "0.01", "--min-learning-rate", "0.1"],
        "--min-learning-rate 0.1 is above --learning-rate 0.01",
    ),
]


@pytest.mark.parametrize("argv, message", REFUSED_TOGETHER, ids=str)
def test_settings_that_do_not_fit_together(argv, message):
    with pytest.raises(UsageError) as refusal:
        flags = parse(*argv)
        TrainConfig(**{n: v for n, v in flags.items() if n in TRAIN and v is not None})
    assert message in refusal.value.with_flags()


def test_help_gives_choices_and_one_line_a_flag():
    text = " ".join(flags_parser().format_help().split())
    assert "--n-layer N number of blocks" in text
    assert "--mlp {swiglu,geglu,gelu,gelu-tanh,relu2} type of the MLP" in text
    assert "--time-limit TIME" in text and "default: None" not in text
    for name in parse():
        assert "--" + name.replace("_", "-") in text
