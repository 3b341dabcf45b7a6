"""Lines for the user about files that are not read as text, and about tables that are."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from minillm.data import formats
from minillm.data.plain_text import shown
from minillm.runtime.ownership import product_around

# Keys of `skipped` besides the endings of files.
HIDDEN, LINK, FOLDER, OURS, BLANK, NOT_UTF8 = (
    "hidden",
    "links to folders",
    "folders",
    "folders that minillm made (runs, prepared corpora)",
    "blank",
    "not UTF-8",
)
SHOWN_KINDS = 6
TABLES = (".csv", ".tsv")  # plain text to minillm


def about_skipped(skipped: Counter[str]) -> str:
    """Return a line about the files that are not read, by kind; "" if there are none.

    skipped: number of files by kind
    """
    others = (HIDDEN, LINK, FOLDER, OURS, BLANK, NOT_UTF8)
    kinds = [(n, kind) for kind, n in skipped.items() if kind not in others and n]
    kinds.sort(key=lambda kind: (-kind[0], kind[1]))
    said = [f"{n} {kind}" for n, kind in kinds[:SHOWN_KINDS]]
    if rest := sum(n for n, _ in kinds[SHOWN_KINDS:]):
        said.append(f"{rest} of other kinds")
    files = sum(n for n, _ in kinds)
    line = f"{files} file{'s' * (files != 1)} ({', '.join(said)})" if files else ""
    counted = (HIDDEN, LINK, FOLDER, OURS, NOT_UTF8)
    more = [f"{skipped[kind]} {kind}" for kind in counted if skipped[kind]]
    if skipped[BLANK]:
        more.append(f"{skipped[BLANK]} blank document{'s' * (skipped[BLANK] != 1)}")
    line = "; ".join([line, *more] if line else more)
    if skipped[".pdf"]:
        line += f"; {formats.NO_PDF}"
    return f"text      skipped {line}" if line else ""


def about_tables(files: Iterable[Path]) -> str:
    """Return a line about tables that are read as plain text; "" if there are none.

    files: the files that are read
    """
    tables = [path for path in files if path.name.lower().removesuffix(".gz").endswith(TABLES)]
    if not tables:
        return ""
    what = f"{shown(tables[0])} is" if len(tables) == 1 else f"{len(tables):,} tables are"
    return f"text      {what} read as plain text; rows are read from .jsonl, .json and .parquet"


def about_no_match(word: str, matches: list[Path]) -> str:
    """Return the message on a pattern that no file matches, or none that is read.

    word: the pattern
    matches: the files and folders that match
    """
    files = [path for path in matches if path.is_file()]
    if not files:
        return f"{shown(word)}: no file matches this pattern"
    kinds = sorted({str(product_around(path)) for path in files})
    ours, them = (
        ("file that matches is", "it") if len(files) == 1 else ("files that match are", "them")
    )
    return (
        f"{shown(word)}: the {len(files):,} {ours} minillm's own, in a {' or '.join(kinds)}; "
        f"name {them} without a pattern to read {them}"
    )
