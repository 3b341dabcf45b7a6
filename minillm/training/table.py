"""Format rows of metrics as lines of a table, with the columns that fit."""

from collections.abc import Callable
from typing import Any, NamedTuple

from minillm.runtime.console import clock

REPEAT = 40  # rows after which the heading is printed again; by then it has left the screen


class Column(NamedTuple):
    """Column of the table: key in a row, heading, width in characters, and how to format it.

    rank: the columns with the lowest ranks are shown if there is not enough space for all
    """

    key: str
    heading: str
    width: int
    rank: int
    text: Callable[[Any], str]


def _number(digits: int) -> Callable[[float], str]:
    """Return a function that formats a number with `digits` digits, fewer if it is large."""
    return lambda x: f"{x:.{digits}f}" if abs(x) < 1000 else f"{x:.3g}"


def speed(tokens_per_s: float) -> str:
    """Return a number of tokens per second in at most nine characters."""
    if tokens_per_s < 10:
        return f"{tokens_per_s:.1f}"
    return f"{tokens_per_s:,.0f}" if tokens_per_s < 1e7 else f"{tokens_per_s / 1e6:,.1f}M"


COLUMNS = (
    Column("step", "step", 7, 0, "{:d}".format),
    Column("loss", "loss", 9, 0, _number(4)),
    Column("val_loss", "val loss", 10, 0, _number(4)),
    Column("val_bpb", "bits/byte", 11, 3, _number(4)),
    Column("lr", "lr", 10, 4, "{:.2e}".format),
    Column("grad_norm", "grad norm", 11, 4, _number(2)),
    Column("tokens_per_s", "tokens/s", 11, 2, speed),
    Column("elapsed", "elapsed", 10, 1, clock),
    Column("remaining", "remaining", 11, 0, clock),
)


class Table:
    """Formatter of rows, with a heading above the first one and wherever it is needed again."""

    def __init__(self) -> None:
        self.shown: tuple[Column, ...] = ()
        self.rows = 0

    def lines(self, row: dict[str, Any], columns: int | None) -> list[str]:
        """Return the line of `row`, after the heading if that has to be printed.

        row: values by key; a column whose value is missing or None stays empty
        columns: width of the terminal in characters; None: no limit
        """
        chosen = fitting(columns)
        heading = []
        if chosen != self.shown or self.rows >= REPEAT:
            self.shown, self.rows = chosen, 0
            heading = ["".join(f"{c.heading:>{c.width}}" for c in chosen)]
        self.rows += 1
        return [*heading, "".join(_cell(row.get(c.key), c) for c in chosen).rstrip()]

    def interrupt(self) -> None:
        """Note that other text has been printed: the next row needs a heading again."""
        self.shown = ()


def fitting(columns: int | None) -> tuple[Column, ...]:
    """Return the columns that fit into `columns` characters. Those of rank 0 are always shown."""
    for rank in sorted({c.rank for c in COLUMNS}, reverse=True):
        chosen = tuple(c for c in COLUMNS if c.rank <= rank)
        if columns is None or sum(c.width for c in chosen) < columns:
            break
    return chosen


def _cell(value: Any, column: Column) -> str:
    text = "" if value is None else column.text(value)
    return f"{text:>{column.width}}"
