"""Format the text of --help: the common flags with examples, or all flags."""

import argparse
import shutil
import textwrap
from collections.abc import Iterable

WIDTH = 80
GENERAL = ("help", "version", "debug")


class Formatter(argparse.HelpFormatter):
    """Formatter that adds each flag's value to its help, and uses at most 80 columns.

    prog: name of the program
    notes: note on a flag's value, by dest; for other flags the parser's default is shown
    """

    def __init__(self, prog: str, notes: dict[str, str]) -> None:
        width = min(WIDTH, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=26, width=max(40, width) - 1)
        self.notes = notes

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, note = action.help or "", self.notes.get(action.dest, "")
        silent = action.default in (None, argparse.SUPPRESS) or action.default is False
        if not note and "default:" not in text and not silent:
            note = f"default: {action.default}"
        if note and text.endswith(")"):
            return f"{text[:-1]}; {note})"
        return f"{text} ({note})" if note else text

    def _split_lines(self, text: str, width: int) -> list[str]:
        # Names of flags and presets are not broken at their dashes.
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = self._split_lines(text, width - len(indent))
        return "\n".join(indent + line for line in lines)


def short(
    parser: argparse.ArgumentParser, namespace: argparse.Namespace | None, refusal: str = ""
) -> str:
    """Return the help on the parser's common flags, with examples.

    parser: the parser
    namespace: the other flags on the command line, or None
    refusal: what is wrong with them
    """
    known = {action.dest: action for action in parser._actions}
    common = [known[name] for name in parser.common]
    shown = [action for action in parser._actions if action.help is not argparse.SUPPRESS]
    f = _begun(parser, namespace, refusal)
    positional = [action for action in common if not action.option_strings]
    _section(f, "arguments", positional)
    _section(f, "common flags", [action for action in common if action.option_strings])
    _examples(f, parser)
    flags = sum(bool(action.option_strings) for action in shown)
    more = "; nanoGPT's names of flags are understood too" if parser.aliases else ""
    f.add_text(f"--help all shows all {flags} flags{more}.")
    return f.format_help()


def whole(
    parser: argparse.ArgumentParser, namespace: argparse.Namespace | None, refusal: str = ""
) -> str:
    """Return the help on all flags of the parser, by group.

    parser: the parser
    namespace: the other flags on the command line, or None
    refusal: what is wrong with them
    """
    f = _begun(parser, namespace, refusal)
    for group in parser._action_groups:
        title = {"positional arguments": "arguments", "options": "flags"}.get(group.title)
        # The flags that every verb has are last in their group.
        last = [action for action in group._group_actions if action.dest in GENERAL]
        rest = [action for action in group._group_actions if action.dest not in GENERAL]
        _section(f, title or group.title, rest + last)
    _examples(f, parser)
    f.add_text(parser.epilog)
    if parser.aliases:
        names = ", ".join(f"{theirs} = {ours}" for theirs, ours in parser.aliases.items())
        f.add_text(f"nanoGPT's names of flags are understood too: {names}.")
    return f.format_help()


def _begun(
    parser: argparse.ArgumentParser, namespace: argparse.Namespace | None, refusal: str
) -> Formatter:
    """Return a formatter with the usage, the description and sentences on the defaults."""
    said, notes = parser.values(namespace)
    f = Formatter(parser.prog, notes)
    words = []
    for action in parser._actions:
        if not action.option_strings:
            name = f"{action.metavar or action.dest}" + " ..." * (action.nargs in ("*", "+"))
            words.append(f"[{name}]" if action.nargs in ("?", "*") else name)
    f.add_usage(" ".join([parser.prog, *words, "[flags]"]).replace("%", "%%"), [], [], "usage: ")
    f.add_text(parser.description)
    f.add_text(said)
    if refusal:
        f.add_text(f"The other flags have no effect here: {refusal}.".replace("?.", "?"))
    return f


def _section(f: Formatter, title: str, actions: Iterable[argparse.Action]) -> None:
    f.start_section(title)
    f.add_arguments(actions)
    f.end_section()


def _examples(f: Formatter, parser: argparse.ArgumentParser) -> None:
    lines = [f"  {command}\n      {what}\n" for command, what in parser.examples]
    if lines:
        f._add_item(lambda: "examples:\n" + "".join(lines) + "\n", [])
