"""The parser itself: strict, one line a refusal, and numbers within their bounds."""

from argparse import ArgumentTypeError

import pytest
from hypothesis import given, strategies as st

from minillm.errors import UsageError
from minillm.runtime.cli import Parser, duration, edits, nearest, real, whole
from minillm.runtime.program import run


def parser():
    p = Parser(prog="x.py", aliases={"--start": "--prompt"})
    p.add_argument("folder", nargs="?")
    p.add_argument("--prompt")
    p.add_argument("--max-tokens", type=whole(1))
    p.add_argument("--stop", action="append")
    p.add_argument("--json", action="store_true")
    return p


def test_what_is_understood():
    args = parser().parse(
        ["run", "--max_tokens=3", "--start", "def f_(", "--stop", "a", "--stop", "b", "--json"]
    )
    assert (args.folder, args.max_tokens, args.prompt) == ("run", 3, "def f_(")
    assert args.stop == ["a", "b"] and args.json and not args.debug
    assert parser().parse(["--", "--folder"]).folder == "--folder"
    assert parser().parse(["--prompt=--max_tokens"]).prompt == "--max_tokens"
    assert parser().parse(["--prompt=a=b"]).prompt == "a=b"
    assert parser().parse(["--prompt="]).prompt == ""


VALUES = [
    *("-- create_table", "--my_text and more", "--max_tokens 3", "-", "-1", "-5m", "- a_b", "a_b"),
    *("--seed=3 apples_pears",),
]
DASHED = [
    *(*VALUES, "--my_text", "--max_tokens", "--max_tokens=3", "--prompt=x", "--start", "--stop"),
    *("--", "-a", "-h", "--help", "--debug", "--no_such=a_b", "---", "--=_"),
]


@pytest.mark.parametrize("text", VALUES)
def test_a_value_that_looks_like_a_flag_is_left_as_it_is(text):
    args = parser().parse(["--prompt", text, "--stop", text, "--max_tokens", "4"])
    assert (args.prompt, args.stop, args.max_tokens) == (text, [text], 4)


@pytest.mark.parametrize("text", DASHED)
def test_a_value_after_an_equals_sign_is_left_as_it_is(text):
    args = parser().parse([f"--prompt={text}", f"--stop={text}", "--json", f"--stop={text}"])
    assert (args.prompt, args.stop, args.json) == (text, [text, text], True)
    assert parser().parse([f"--start={text}"]).prompt == text


@pytest.mark.parametrize(
    "text", ["--my_run", "--prompt", "--max_tokens=3", "--start", "-a", "--help"]
)
def test_words_after_two_dashes_are_no_flags(text):
    assert parser().parse(["--prompt", "x", "--", text]).folder == text


@pytest.mark.parametrize("text", [text for text in DASHED if text not in (*VALUES, "--")])
@pytest.mark.parametrize("flag", ["--prompt", "--stop", "--start"])
def test_a_value_with_a_dash_gets_a_hint(flag, text):
    """Also where the text is a flag's name: it is not taken for one that is given twice."""
    with pytest.raises(UsageError) as refusal:
        parser().parse([flag, text, "--max-tokens", "3", "--debug"])
    assert str(refusal.value).endswith(
        f"a value that begins with a dash is written {flag.replace('start', 'prompt')}={text}"
    )


def test_a_negative_number_is_a_value():
    for text in ("-1", "-1.5", "-.5", "-1e3", "-1e-3", "-inf"):
        with pytest.raises(UsageError, match="argument --heat: (.* is out of range|'-inf' is not)"):
            p = parser()
            p.add_argument("--heat", type=real(0))
            p.parse(["--heat", text])


REFUSED = [
    (["--max-tok", "3"], "unknown flag --max-tok; flags that begin so: --max-tokens"),
    (["--p", "x"], "unknown flag --p"),
    (["--strat", "x"], "unknown flag --strat; did you mean --start?"),
    (["--wibble=3"], "unknown flag --wibble; see --help"),
    (["-x"], "unknown flag -x"),
    (["a", "b"], "unexpected argument 'b'; each value stands behind its flag, see --help"),
    (["--json", "--json"], "--json is given twice; give it once"),
    (["--prompt", "a", "--start", "b"], "--prompt is given twice"),
    (["--max-tokens", "0"], "argument --max-tokens: 0 is out of range; expected at least 1"),
    (["--max-tokens", "x"], "argument --max-tokens: 'x' is not a whole number"),
    (["--max-tokens"], "argument --max-tokens: expected one argument"),
    (["--json=yes"], "argument --json: takes no value; got 'yes'"),
]


@pytest.mark.parametrize("argv, message", REFUSED, ids=str)
def test_what_is_refused(argv, message):
    with pytest.raises(UsageError) as refusal:
        parser().parse(argv)
    assert message in str(refusal.value)


def test_a_refusal_ends_with_two_in_one_line(capsys):
    assert run("x.py", parser().parse, ["--wibble"]) == 2
    assert capsys.readouterr().err == "x.py: error: unknown flag --wibble; see --help all\n"


def test_help_ends_with_zero(capsys):
    assert run("x.py", parser().parse, ["--help"]) == 0
    assert "--max-tokens" in capsys.readouterr().out


@given(st.lists(st.text(max_size=8), max_size=4))
def test_any_words_are_parsed_or_refused(argv):
    if {"-h", "--help"} & set(argv) or any(w.startswith("-h") for w in argv):
        return
    try:
        parser().parse(argv)
    except UsageError as refusal:
        assert str(refusal)


@given(st.integers())
def test_whole(value):
    parse = whole(-5, 1000)
    if -5 <= value <= 1000:
        assert parse(str(value)) == value
    else:
        with pytest.raises(ArgumentTypeError, match="expected between -5 and 1000"):
            parse(str(value))


@given(st.floats())
def test_real(value):
    parse = real(0.0, 1.0, above=True, below=True)
    if 0 < value < 1:
        assert parse(repr(value)) == value
    else:
        with pytest.raises(ArgumentTypeError):
            parse(repr(value))


def test_the_ends_of_real():
    assert real(0.0, 1.0)("0") == 0.0 and real(0.0, 1.0)("1") == 1.0
    with pytest.raises(ArgumentTypeError, match="0 is not above 0"):
        real(0.0, 1.0, above=True)("0")
    with pytest.raises(ArgumentTypeError, match="1.0 is not below 1"):
        real(0.0, 1.0, below=True)("1.0")
    with pytest.raises(ArgumentTypeError, match="-1.0 is out of range; expected at least 0"):
        real(0.0)("-1")


@pytest.mark.parametrize(
    "text, seconds",
    [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), (" 2 m ", 120), (".5s", 0.5)],
)
def test_duration(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-1", "1d", "m", "1e3", "1m30s", "inf", "nan"])
def test_refused_durations(text):
    with pytest.raises(ArgumentTypeError, match="is not a duration such as 90s, 10m or 2h"):
        duration(text)


@pytest.mark.parametrize(
    "a, b, distance",
    [("", "", 0), ("seed", "seed", 0), ("sede", "seed", 1), ("seeed", "seed", 1),
     ("sed", "seed", 1), ("soed", "seed", 1), ("wandb", "window", 3), ("lr", "", 2),
     ("kitten", "sitting", 3), ("stpes", "steps", 1), ("bacth-szie", "batch-size", 2)],
)  # fmt: skip
def test_edits(a, b, distance):
    assert edits(a, b) == edits(b, a) == distance


def test_suggestions_are_at_most_two_edits_away():
    names = ["window", "seed", "learning-rate", "out", "lr"]
    near = {
        "wandb": None, "learn": None, "x": None, "windows-size": None, "sede": "seed",
        "widnwo": "window", "wndw": "window", "ot": "out", "lerning-rat": "learning-rate",
    }  # fmt: skip
    assert {word: nearest(word, names) for word in near} == near
