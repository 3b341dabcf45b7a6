"""Help: the values that will hold, the common flags first, examples that can be pasted."""

import re
import shlex
from importlib import import_module

import pytest

from minillm.__main__ import EXAMPLES, VERBS
from minillm.config.resolve import resolve
from minillm.config.train import PRESETS
from minillm.runtime import program

FLAGS = {verb: import_module(f"minillm.flags.{verb}") for verb in VERBS}


@pytest.fixture
def shown(capsys, monkeypatch):
    """shown(verb, *words) -> what help prints."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(verb: str, *words: str) -> str:
        assert program.run(verb, FLAGS[verb].parse, words) == 0
        return capsys.readouterr().out

    return run


def note(text: str, flag: str) -> str:
    """What help says of the value of a flag: the end of its entry, in brackets."""
    entry = re.search(rf"^  {flag}\b.*?(?=^  -|^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    return " ".join(entry[0].split()).rpartition("(")[2].rstrip(")").rpartition("; ")[2]


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_help_shows_the_values_that_hold(shown, preset):
    words = ["--device", "cpu", *(["--preset", preset] if preset else [])]
    text = shown("train", *words, "--help", "all")
    holds = resolve({"preset": preset}, None, "nano").flat()
    for name in ("n_layer", "n_head", "d_model", "seq_len", "batch_size", "warmup", "optimizer"):
        said = note(text, "--" + name.replace("_", "-"))
        assert said == f"default: {holds[name]}", name
    for name in ("learning_rate", "min_learning_rate", "decay_fraction"):
        said = note(text, "--" + name.replace("_", "-"))
        assert float(said.removeprefix("default: ")) == pytest.approx(holds[name], rel=1e-5), name
    for name in ("d_ff", "d_head", "n_kv_head"):
        assert note(text, "--" + name.replace("_", "-")).endswith(f" {holds[name]}"), name
    assert f"The defaults shown are those of --preset {preset or 'nano'}" in text


def test_help_shows_what_other_flags_make_of_a_value(shown):
    text = shown("train", "--help", "all", "--learning-rate", "0.5", "--device", "cpu")
    assert note(text, "--learning-rate") == "given: 0.5"
    assert note(text, "--min-learning-rate") == "default: 0.01"
    assert "--preset tiny, which is used on a GPU" in shown("train", "--help", "--device", "cuda")
    assert note(shown("plan", "--help", "--preset", "small"), "--n-layer") == "default: 12"


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_terminal_and_begins_with_the_common_flags(shown, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    short, long = shown(verb, "--help"), shown(verb, "--help", "all")
    assert shown(verb, "-h") == short and shown(verb, "--help=all") == long
    for text in (short, long):
        assert all(len(line) <= 80 for line in text.splitlines())
    group = long.partition("\nflags:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^  (-[-\w]+)", group, re.MULTILINE)
    assert len(entries) > 3 and entries[-3:] == ["-h", "--version", "--debug"]
    known = {action.option_strings[-1] for action in FLAGS[verb].parser()._actions
             if action.option_strings and action.help != "==SUPPRESS=="}  # fmt: skip
    assert {flag for flag in known if f"{flag}" in long} == known
    if FLAGS[verb].parser().common:
        assert short.count("\n  --") <= 16 and len(short.splitlines()) < 65
        assert "common flags:" in short and "--help all shows all" in short


@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_help_can_be_pasted(verb, tmp_path, monkeypatch):
    """Each is parsed and checked, where the files that it names exist."""
    monkeypatch.chdir(tmp_path)
    for name in ("my.txt", "texts/a.txt", "rows.jsonl", "runs/nano-1/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    examples = FLAGS[verb].parser().examples
    assert len(examples) == 3
    for command, _ in examples:
        words = shlex.split(command)
        at = words.index(verb if verb in words else f"{verb}.py")
        FLAGS[verb].parse(words[at + 1 :])


def test_examples_of_the_verbs_can_be_pasted():
    for verb, *words in EXAMPLES:
        FLAGS[verb].parse(words)


def test_help_comes_in_spite_of_other_words(shown):
    for words in (["--wibble", "--help"], ["--help", "--n-layer", "x"], ["--n-layer", "x", "-h"],
                  ["--help", "--config", "none.json"]):  # fmt: skip
        assert "common flags:" in shown("train", *words)


def test_help_says_that_the_other_flags_are_refused(shown):
    text = " ".join(shown("train", "--preset", "smal", "--help").split())
    assert "no effect here: argument --preset: 'smal' is not one of" in text
    assert "did you mean small?" in text and "those of --preset nano" in text
    text = " ".join(shown("plan", "--help", "--config", "none.json", "--preset", "small").split())
    assert "those of --preset nano" in text and "no effect here: --config none.json: " in text
    for words in ([], ["--preset", "small"]):
        assert "no effect here" not in shown("train", *words, "--help")
