"""Make the HTML tables of the profile's page: cells, and tables without empty columns."""

from collections.abc import Iterable, Sequence
from html import escape

from minillm.profiling.page.pivot import Line, number, times

# A cell: what is shown, what it is sorted by (None: by what is shown), its CSS class.
Cell = tuple[str, object, str]
NOTHING = "–"


def cell(shown: str, by: object = None, css: str = "") -> Cell:
    """Return a cell of a table.

    shown: text that is shown; "-", for a value that was not measured, becomes a dash
    by: value that the column is sorted by; None: the text
    css: CSS class
    """
    return (NOTHING if shown == "-" else shown, by, css)


def table(header: Sequence[str], body: Iterable[Sequence[Cell]], css: str = "") -> str:
    """Return a table that the page's script can sort, or "" if it would be empty.

    Empty columns are left out. The table scrolls where the page is narrow.

    header: titles of the columns
    body: lines of cells
    css: CSS class of the table
    """
    lines = [list(line) for line in body]
    kept = [i for i in range(len(header)) if any(line[i][0] not in (NOTHING, "") for line in lines)]
    if not kept:
        return ""
    header, lines = [header[i] for i in kept], [[line[i] for i in kept] for line in lines]
    right = {i for line in lines for i, one in enumerate(line) if number(one[1]) is not None}

    def made(tag: str, i: int, shown: str, kind: str = "", more: str = "") -> str:
        kinds = f"{kind} n".strip() if i in right else kind
        return f"<{tag}{f' class={kinds!r}' if kinds else ''}{more}>{escape(shown)}</{tag}>"

    head = "".join(made("th", i, title, more=' scope="col"') for i, title in enumerate(header))
    rows = []
    for line in lines:
        cells = []
        for i, (shown, by, kind) in enumerate(line):
            x = number(by)
            cells.append(made("td", i, shown, kind, f' data-v="{x!r}"' if x is not None else ""))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll {css}"><table class="sort"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{chr(10).join(rows)}</tbody></table></div>\n"
    )


def ratio(line: Line) -> Cell:
    """Return the speed of ours divided by that of the best other implementation, and its name."""
    shown, value, css = speedup(line.ratio)
    return cell("-" if value is None else f"{shown} {line.best(ours=False)}", value, css)


def speedup(value: float | None) -> Cell:
    """Return a ratio, coloured as a gain or a loss."""
    return cell(times(value), value, "" if value is None else "win" if value >= 1 else "lose")
