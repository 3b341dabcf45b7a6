"""Random command lines and configuration files, drawn from the real parsers: which flags there are,
what each takes, and what it does not.
"""

import argparse
import inspect
import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from minillm.config.flags import ALIASES, setting_fields
from minillm.config.model import depths_text
from minillm.config.resolve import resolve

NASTY = [
    *("", " ", "abc", "-1", "0", "1.5", "1e9", "1e999", "-inf", "nan", "NaN", "None", "null"),
    *("true", "9" * 30, "9" * 5000, "0x10", "1_0", "+3", " 4 ", "\u0663", "\u00b2", "-", "--"),
    *("---", "=", "%", "%s%d", "{}", "{0}", "a\nb", "a\0b", "\udcff", "\x1b[31m", "\u202e"),
    *("\U0001f642", "x" * 400, "*", "[", "**/x", "~", "/", ".", "..", "/proc/self/mem", "1,2"),
    *("/dev/null", "1,0,1", "1,2,3,4", "-5x", "@file", "cuda", "cuda:99", "cuda:-1", "mps"),
    *("meta", "cpu:7", "auto"),
]
# What a flag that takes any text is given to be right; {t} is the folder of `place`.
FINE = {
    "data": ["{t}/text.txt", "{t}"],
    "paths": ["{t}/text.txt", "{t}"],
    "out": ["new", "{t}/new/run"],
    "cache_dir": ["{t}/cache"],
    "init_from": ["{run}"],
    "resume": ["{run}"],
    "run": ["{run}"],
    "config": ["good.json"],
    "tokenizer": ["bpe", "char", "byte"],
    "device": ["auto", "cpu"],
    "threads": ["auto", "1", "2"],
    "micro_batch_size": ["auto", "1"],
    "checkpoint": ["last", "best", "4"],
    "prompt_file": ["{t}/text.txt"],
    "prompt": ["the cat", "", "\U0001f642"],
    "stop": ["."],
    "tune": ["rms_norm"],
    "op": ["rms_norm", "attention"],
    "trace": ["trace.json"],
}
PATHS = ["{t}", "{t}/text.txt", "{t}/none", "{t}/text.txt/x", "{run}", "{t}/good.json", "x" * 300]


def bounds(action: argparse.Action) -> dict[str, Any]:
    """What the closure of a flag's type allows: low, high, choices, above, below."""
    if not inspect.isfunction(action.type):
        return {}
    return dict(inspect.getclosurevars(action.type).nonlocals)


def fine(action: argparse.Action) -> st.SearchStrategy[str]:
    """Texts that the flag takes by itself."""
    rules = bounds(action)
    choices = action.choices or rules.get("choices")
    if choices:
        return st.sampled_from(sorted(choices))
    if "low" in rules and "above" not in rules:
        low, high = rules["low"], rules["high"]
        powers = [1 << n for n in range(25)]
        inside = [n for n in (*powers, low, low + 1) if low <= n and (high is None or n <= high)]
        return st.sampled_from(inside).map(str)
    if "low" in rules:
        low, high = rules["low"], rules["high"]
        top = 1e3 if high is None else high
        return st.sampled_from([low + (top - low) * x for x in (0.125, 0.5, 0.9375)]).map(str)
    if action.dest in FINE:
        return st.sampled_from(FINE[action.dest])
    if action.type is depths_text:
        return st.sampled_from(["1,2,1", "0,1,0", "2,4,2"])
    if action.dest == "time_limit":
        return st.sampled_from(["90", "90s", "10m", "1.5h"])
    return st.sampled_from(["yes", "false", "1", "0"])


def wrong(action: argparse.Action) -> st.SearchStrategy[str]:
    """Texts that the flag may refuse: beyond its ends, of another type, of another flag, any."""
    rules = bounds(action)
    ends = [rules[name] for name in ("low", "high") if rules.get(name) is not None]
    beyond = [str(x) for end in ends for x in (end - 1, end + 1, -end, 2 * end, end)]
    return st.one_of(
        st.sampled_from([*beyond, "nan", "inf", "1e999", "1.5", "abc", ""]),
        st.sampled_from([*NASTY, *PATHS]),
        st.text(max_size=12),
        st.text(st.characters(codec="latin-1"), max_size=6),
        st.floats().map(str),
        st.integers().map(str),
    )


def spelling(draw: st.DrawFn, action: argparse.Action, aliases: dict[str, str]) -> str:
    """One of the flag's names, or an alias, with dashes or underscores."""
    names = list(action.option_strings)
    names += [theirs for theirs, ours in aliases.items() if ours in names]
    name = draw(st.sampled_from(names))
    return "--" + name[2:].replace("-", "_") if draw(st.integers(0, 4)) == 0 else name


@dataclass(frozen=True)
class Case:
    """A command line, and the content of c.json or c.toml where it names that."""

    argv: tuple[str, ...]
    file: str | bytes | None
    ending: str


@st.composite
def cases(draw: st.DrawFn, parser: argparse.ArgumentParser, config: bool) -> Case:
    """Command lines of `parser`, half of them with nothing wrong in any single word.

    config: whether it takes --config, which then is a random file now and then.
    """
    spoilt = draw(st.booleans())
    skipped = ("help", "debug", "config", argparse.SUPPRESS) if not spoilt else ("debug", "config")
    actions = [a for a in parser._actions if a.option_strings and a.dest not in skipped]
    words: list[str] = []
    for action in draw(st.lists(st.sampled_from(actions), max_size=6, unique_by=_dest)):
        is_wrong = spoilt and draw(st.booleans())
        flag = spelling(draw, action, parser.aliases)
        if action.nargs == 0 or action.nargs == "?" and draw(st.booleans()):
            words.append(flag + draw(st.sampled_from(["", "=1"])) if is_wrong else flag)
            continue
        value = draw(wrong(action) if is_wrong else fine(action))
        joined = value.startswith("-") or draw(st.booleans())
        words += [f"{flag}={value}"] if joined and not (is_wrong and draw(st.booleans())) else [
            flag, value
        ]  # fmt: skip
    for action in (a for a in parser._actions if not a.option_strings):
        if draw(st.booleans()):
            words.insert(draw(st.sampled_from([0, len(words)])), draw(fine(action)))
    if spoilt and draw(st.booleans()):
        words = draw(_spoil(words))
    file, ending = None, "json"
    if config and draw(st.integers(0, 2)) == 0:
        file, ending = draw(files(spoilt))
        words += ["--config", f"c.{ending}"]
    return Case(tuple(words), file, ending)


def _dest(action: argparse.Action) -> str:
    return action.dest


@st.composite
def _spoil(draw: st.DrawFn, words: list[str]) -> list[str]:
    """One word more, less, twice or misspelt."""
    at = draw(st.integers(0, len(words)))
    way = draw(st.integers(0, 3))
    if way == 0 or not words:
        return [*words[:at], draw(st.sampled_from([*NASTY, *PATHS])), *words[at:]]
    at = min(at, len(words) - 1)
    if way == 1:
        return words[:at] + words[at + 1 :]
    if way == 2:
        return [*words, words[at]]
    cut = draw(st.integers(0, len(words[at])))
    return [*words[:at], words[at][:cut] + words[at][cut + 1 :], *words[at + 1 :]]


@st.composite
def files(draw: st.DrawFn, spoilt: bool) -> tuple[str | bytes, str]:
    """A configuration file and its ending; spoilt: with wrong keys, values or syntax."""
    ending = draw(st.sampled_from(["json", "toml"]))
    if spoilt and draw(st.integers(0, 3)) == 0:
        return draw(
            st.one_of(st.text(), st.binary(), st.sampled_from(["[" * 5000, "a.b.c = 1"]))
        ), (draw(st.sampled_from(["json", "toml", "yaml"])))
    right = _right_values()
    table = {}
    for name in draw(st.lists(st.sampled_from(sorted(right)), max_size=6, unique=True)):
        key = name.replace("_", "-") if draw(st.booleans()) else name
        if spoilt and draw(st.integers(0, 5)) == 0:
            aliases = [a[2:] for a in ALIASES]
            key = draw(
                st.one_of(st.text(max_size=8), st.sampled_from([*aliases, key[:-1], "model"]))
            )
        value = right[name]
        if spoilt and draw(st.booleans()):
            value = draw(VALUES)
        table[key] = value
    if ending == "json":
        text = json.dumps(table, ensure_ascii=draw(st.booleans()))
    else:
        text = "".join(f"{json.dumps(k)} = {_toml(v)}\n" for k, v in table.items())
    if spoilt and draw(st.integers(0, 5)) == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(["", "\0", "{", ",", "\n", "}"])) + text[at + 1 :]
    return text, ending


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from([*NASTY, 0, -1, 10**30, 10**400, 2**63, True, float("nan"), 1.0]),
)  # fmt: skip
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS)


def _right_values() -> dict[str, Any]:
    """Every setting at what it is without any flag."""
    flat = resolve({}, None, "nano").flat()
    return {name: flat[name] for name in setting_fields() if flat[name] is not None}


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return repr(value).replace("1e", "1.0e")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
