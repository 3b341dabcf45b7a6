"""Standard error as a screen: permanent lines, and one progress bar below them.

All lines must go through `write`, so that they appear above the bar and the bar is drawn again
below them. A bar never fills the last column and leaves the cursor at the start of its line: a
terminal then neither wraps it nor leaves pieces of it behind when it echoes a key such as Ctrl-C.
"""

import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TextIO

from tqdm import tqdm

from minillm.runtime.terminal import visible

USUAL_COLUMNS = 80  # of a terminal that does not say how wide it is
SHORTEST_BAR = 8  # columns; facts beside the bar are left out before it gets shorter
REDRAW_S = 0.1
# To the end of the line, then of the screen; the second alone puts the line into tmux's history.
ERASE = "\x1b[K\x1b[J"  # not every Windows console knows it
INDENT = 10  # of the second line of a message, below the text after its label


class Fact(NamedTuple):
    """A piece of text beside the bar.

    rank: the facts with the lowest ranks are shown when there is not enough space for all.
    """

    rank: int
    text: str


class View(NamedTuple):
    """What a bar shows.

    label: text before the bar.
    done, total: how much of the work is done; total 0 shows no bar, only the texts.
    facts: texts after the bar, in the order in which they are shown.
    """

    label: str
    done: int = 0
    total: int = 0
    facts: tuple[Fact, ...] = ()


class Bar(tqdm):
    """One line at the bottom of the terminal, drawn at most every REDRAW_S; gone once closed.

    view: returns what to show now.
    """

    monitor_interval = 0  # tqdm would start a thread to redraw bars that nothing redraws

    def __init__(self, view: Callable[[], View]) -> None:
        self.view, self.drawn = view, 0.0
        # Fixed sizes, so that tqdm does not look for them: they are looked up at each drawing.
        super().__init__(file=sys.stderr, leave=False, ncols=USUAL_COLUMNS, nrows=20, position=0)

    @property
    def format_dict(self) -> dict:
        """What tqdm draws the line from, for the present width of the terminal."""
        view, columns = self.view(), (width(self.fp) or USUAL_COLUMNS) - 1
        drawn = {"ncols": columns, "n": view.done, "total": view.total or None}
        return {**super().format_dict, **drawn, "bar_format": _line(view, columns)}

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """Return what writes the line in the place of the one before it."""
        before = 0

        def show(line: str) -> None:
            nonlocal before
            # A terminal that has become narrower may show the line before on two: erase all below.
            rest = " " * (before - len(line)) if os.name == "nt" else ERASE
            file.write(f"\r{line}{rest}\r")
            file.flush()
            before = len(line)

        return show

    def redraw(self, now: bool = False) -> None:
        """Draw the line, unless it was drawn a moment ago and `now` is false."""
        moment = time.monotonic()
        if now or moment - self.drawn >= REDRAW_S:
            self.drawn = moment
            self.refresh()


def _line(view: View, columns: int) -> str:
    """The view as tqdm's bar_format, of at most `columns` columns."""
    left = columns - len(view.label) - 3
    left -= SHORTEST_BAR if view.total else 0
    shown: list[Fact] = []
    for fact in sorted(view.facts):
        if len(fact.text) + 2 > left:
            break
        left -= len(fact.text) + 2
        shown.append(fact)
    facts = "  ".join(fact.text for fact in view.facts if fact in shown)
    line = f"{view.label} |{{bar}}| {facts}" if view.total else f"{view.label}  {facts}"
    return line.rstrip()


def width(stream: TextIO) -> int | None:
    """Return the columns of the terminal behind `stream`, or None if there is no terminal."""
    if not stream.isatty():
        return None
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # a terminal that is no file, or a system that does not say
        columns = 0
    return columns or USUAL_COLUMNS


def write(text: str, file: TextIO | None = None) -> None:
    """Print a line that stays, above the bar if there is one.

    text: on a terminal, lines that begin with a label are wrapped between words. Others may end in
        a command to copy, which a line break would spoil.
    file: standard error if None.
    """
    file = sys.stderr if file is None else file
    columns = width(file)
    if columns is not None:
        text = "\n".join(_wrapped(line, columns) for line in text.split("\n"))
    write_unwrapped(text, file)


def write_unwrapped(text: str, file: TextIO) -> None:
    """Print text that is not wrapped, and a line break, above the bar if there is one."""
    Bar.write(visible(text, file), file=file)
    file.flush()


def _wrapped(line: str, columns: int) -> str:
    labelled = line[INDENT - 2 : INDENT] == "  " and not line[:1].isspace()
    if len(line) <= columns or not labelled:
        return line
    return textwrap.fill(
        line, columns - 1, subsequent_indent=" " * INDENT, break_long_words=False,
        break_on_hyphens=False, replace_whitespace=False, drop_whitespace=True,
    )  # fmt: skip


@contextmanager
def busy(label: str, shown: bool = True) -> Iterator[None]:
    """Show `label` on a terminal while something takes a while; nothing stays of it.

    shown: False does nothing, for ranks that print nothing.
    """
    bar = Bar(lambda: View(label)) if shown and width(sys.stderr) is not None else None
    try:
        yield
    finally:
        if bar is not None:
            bar.close()


def clock(seconds: float) -> str:
    """Return a length of time as 0:09, 12:34, 1:23:45 or 4d 11h."""
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days >= 4:
        return f"{days}d {hours % 24:02}h"
    if hours:
        return f"{hours}:{minutes % 60:02}:{whole % 60:02}"
    return f"{minutes}:{whole % 60:02}"
