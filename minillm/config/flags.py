"""Settings: the two configurations of a run, and the flags that are made from their fields.

There is no second list of flags. resolve.py merges presets, files and flags.
"""

import argparse
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, dataclass, fields
from typing import Any

from minillm.config.train import PRESETS, ModelConfig, TrainConfig
from minillm.runtime import cli
from minillm.runtime.terminal import decoded

ALIASES = {
    "--block-size": "--seq-len",
    "--n-embd": "--d-model",
    "--max-iters": "--steps",
    "--eval-interval": "--eval-every",
    "--out-dir": "--out",
    "--warmup-iters": "--warmup",
    "--eval-iters": "--eval-batches",
    "--lr": "--learning-rate",
    "--min-lr": "--min-learning-rate",
}


@dataclass(frozen=True)
class Settings:
    """The resolved configuration of a run.

    given: names of the settings that the user gave, by a flag or in a --config file
    """

    model: ModelConfig
    train: TrainConfig
    given: frozenset[str]

    def flat(self) -> dict[str, Any]:
        """Return every setting by its name, as --config takes them."""
        values = {**asdict(self.model), **asdict(self.train)}
        return {name: values[name] for name in sorted(setting_fields())}


def add_flags(parser: cli.Parser) -> None:
    """Add one flag for each setting to the parser, in the groups of the fields."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in setting_fields().values():
        if title := f.metadata.get("group"):
            group = groups.get(title) or parser.add_argument_group(title)
            groups[title] = group
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        options = {"dest": f.name, "default": None}
        if kind_of(f) is bool:
            words = {"nargs": "?", "const": True, "type": _boolean, "metavar": "true|false"}
            group.add_argument(flag, help=text, **words, **options)
            opposite = {"action": "store_const", "const": False, "help": argparse.SUPPRESS}
            group.add_argument("--no-" + flag[2:], **opposite, **options)
        else:
            metavar = metavar_of(f)
            if "choices" in f.metadata and not metavar.startswith("{"):
                text += ": " + ", ".join(f.metadata["choices"])
            what = {"type": parser_of(f), "metavar": metavar}
            what |= {"nargs": "+"} if f.metadata.get("many") else {}
            group.add_argument(flag, help=text.replace("%", "%%"), **what, **options)


def notes(settings: Settings) -> dict[str, str]:
    """Return the note of --help on each setting's value, by name: the value and its source."""
    flat, chosen = settings.flat(), PRESETS.get(settings.train.preset, {})
    return {name: text for name, f in setting_fields().items()
            if (text := _note(f, flat[name], name in settings.given, name in chosen))}  # fmt: skip


def _note(f: Field, value: Any, is_given: bool, is_chosen: bool) -> str:
    if is_given:
        return f"given: {_shown(f, value)}"
    derived = None if is_chosen else f.metadata.get("derived")
    if value is None:
        return f"default: {derived}" if derived else ""
    if derived and f.name != "preset":
        return f"default: {derived}; here {_shown(f, value)}"
    return f"default: {_shown(f, value)}"


def _shown(f: Field, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if f.name == "time_limit":
        return f"{value:g}s"
    return f"{value:g}" if isinstance(value, float) else str(value)


def setting_fields() -> dict[str, Field]:
    """Return the fields of ModelConfig and TrainConfig that are settings, by name."""
    return {f.name: f for owner in (ModelConfig, TrainConfig) for f in fields(owner) if f.metadata}


def kind_of(f: Field) -> type:
    """Return the type of a setting's value: int, float, bool or str."""
    words = str(f.type.__name__ if isinstance(f.type, type) else f.type).split(" | ")
    return {"int": int, "float": float, "bool": bool, "str": str}[words[0]]


def metavar_of(f: Field) -> str:
    """Return what help shows for the value of a flag."""
    if "metavar" in f.metadata:
        return f.metadata["metavar"]
    if "choices" in f.metadata:
        braces = "{" + ",".join(f.metadata["choices"]) + "}"
        return braces if len(braces) <= 40 else "NAME"
    if "parse" in f.metadata:
        return "TIME"
    return {int: "N", float: "X", str: "TEXT"}[kind_of(f)]


def parser_of(f: Field) -> Callable[[str], Any]:
    """Return the function that parses a flag's text; it raises ArgumentTypeError if it cannot."""
    rules = f.metadata
    if "parse" in rules:
        return rules["parse"]
    if "choices" in rules:
        return _one_of(rules["choices"])
    if rules.get("is_path"):
        return cli.path_text
    if kind_of(f) is int:
        return cli.whole(rules["low"], rules.get("high"))
    if kind_of(f) is float:
        return cli.real(rules["low"], rules.get("high"), above=rules.get("above", False))
    return decoded


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text in choices:
            return text
        raise ArgumentTypeError(cli.not_one_of(text, choices))

    return parse


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise ArgumentTypeError(f"{text!r} is not true or false")
