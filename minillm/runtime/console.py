"""Write permanent lines to standard error, with one progress bar below them.

All lines must be written with `write`, so that they appear above the bar and the bar is drawn again
below them. A bar never fills the last column and leaves the cursor at the start of its line. So a
terminal does not wrap it, and no part of it is left when the terminal echoes a key such as Ctrl-C.
"""

import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import NamedTuple, TextIO

from tqdm import tqdm

from minillm.runtime.terminal import visible

USUAL_COLUMNS = 80  # for a terminal of unknown width
SHORTEST_BAR = 8  # columns; facts next to the bar are left out before it gets shorter
REDRAW_S = 0.1
# Erases to the end of the line, then of the screen; the second alone fills tmux's history.
ERASE = "\x1b[K\x1b[J"  # some Windows consoles do not know it
INDENT = 10  # columns before further lines of a message, which align with the text of the first


class Fact(NamedTuple):
    """Text next to the bar.

    rank: if there is not enough space for all facts, those with the lowest ranks are shown
    text: the text
    """

    rank: int
    text: str


class View(NamedTuple):
    """Content of a bar.

    label: text before the bar
    done: amount of work that is done
    total: amount of all work; 0 shows the texts without a bar
    facts: texts after the bar, in the order in which they are shown
    """

    label: str
    done: int = 0
    total: int = 0
    facts: tuple[Fact, ...] = ()


class Bar(tqdm):
    """One line at the bottom of the terminal, drawn at most every REDRAW_S, erased by `close`.

    view: function that returns the present content
    """

    monitor_interval = 0  # no thread of tqdm that redraws idle bars
    # tqdm would make a lock when a line is first written, and a signal in that moment would leave
    # it without one.
    _lock = RLock()

    def __init__(self, view: Callable[[], View]) -> None:
        self.view, self.drawn = view, 0.0
        # Fixed sizes, so that tqdm does not look them up; format_dict does at each drawing.
        super().__init__(file=sys.stderr, leave=False, ncols=USUAL_COLUMNS, nrows=20, position=0)

    @property
    def format_dict(self) -> dict:
        """Values from which tqdm draws the line, for the present width of the terminal."""
        view, columns = self.view(), (width(self.fp) or USUAL_COLUMNS) - 1
        drawn = {"ncols": columns, "n": view.done, "total": view.total or None}
        return {**super().format_dict, **drawn, "bar_format": _line(view, columns)}

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """Return a function that writes the line in place of the one before it."""
        before = 0

        def show(line: str) -> None:
            nonlocal before
            # On a terminal that has become narrower the last line may take two; erase all below.
            rest = " " * (before - len(line)) if os.name == "nt" else ERASE
            file.write(f"\r{line}{rest}\r")
            file.flush()
            before = len(line)

        return show

    def redraw(self, now: bool = False) -> None:
        """Draw the line, unless it was drawn within REDRAW_S and `now` is false."""
        moment = time.monotonic()
        if now or moment - self.drawn >= REDRAW_S:
            self.drawn = moment
            self.refresh()


def _line(view: View, columns: int) -> str:
    """Return the view as tqdm's bar_format, in at most `columns` columns."""
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
    except (OSError, ValueError):  # the terminal is not a file, or the system does not know
        columns = 0
    return columns or USUAL_COLUMNS


def write(text: str, file: TextIO | None = None) -> None:
    """Print a permanent line, above the bar if there is one.

    text: the line, or several. On a terminal, lines that begin with a label are wrapped between
        words. Others are not, as they may end in a command to copy.
    file: the stream; None for standard error
    """
    file = sys.stderr if file is None else file
    columns = width(file)
    if columns is not None:
        text = "\n".join(_wrapped(line, columns) for line in text.split("\n"))
    write_unwrapped(text, file)


def write_unwrapped(text: str, file: TextIO) -> None:
    """Print text and a line break, without wrapping, above the bar if there is one.

    text: the text
    file: the stream
    """
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
    """Show a label on a terminal until the body has ended.

    label: the label
    shown: False shows nothing, for ranks that do not print
    """
    bar = Bar(lambda: View(label)) if shown and width(sys.stderr) is not None else None
    try:
        yield
    finally:
        if bar is not None:
            bar.close()


def clock(seconds: float) -> str:
    """Return a duration as 0:09, 12:34, 1:23:45 or 4d 11h."""
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days >= 4:
        return f"{days}d {hours % 24:02}h"
    if hours:
        return f"{hours}:{minutes % 60:02}:{whole % 60:02}"
    return f"{minutes}:{whole % 60:02}"
