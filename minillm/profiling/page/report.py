"""Write the files of a profile (results.json, a CSV for each suite, index.html) and its tables."""

import csv
import io
import json
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.profiling.page import correlation, page, pivot
from minillm.profiling.page.columns import COLUMNS, SHOWN
from minillm.profiling.page.earlier import RESULTS, read, refuse_foreign
from minillm.profiling.page.pivot import RIVALS, Line, Row, number, per_cent, short, text, times
from minillm.runtime.files import write_durably

CASE = ("shape", "dtype", "pass")  # titles of the first columns


def write(folder: Path, about: dict, suites: dict[str, list[dict]]) -> list[Path]:
    """Write the results of a run, each file whole or not at all, and return the paths.

    Results of an earlier run in the same folder stay if this run has none for the same suite, or
    the same operation of a suite. The facts about that run stay with them under "earlier", by
    suite, or by "SUITE OP" for rows of one operation. Older rows come before new ones. Numbers that
    are not finite become null.

    folder: folder of the results, which is made if it does not exist
    about: facts about this call: device, driver, versions, commit, date, command, ceilings
    suites: rows by suite; the page shows unknown suites as plain tables

    Raises ValueError if the name of a suite is not a plain word, because a file is named after it,
    and UsageError as refuse_foreign does.
    """
    for name in suites:
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
            raise ValueError(f"suites: got the name {name!r}, expected a word such as 'kernels'")
    folder = Path(folder)
    refuse_foreign(folder, suites)
    folder.mkdir(parents=True, exist_ok=True)
    results = _merged(_plain({"about": about, "suites": suites}), read(folder / RESULTS))
    files = {RESULTS: json.dumps(results, indent=1, allow_nan=False) + "\n"}
    files |= {f"{name}.csv": _csv(name, rows) for name, rows in results["suites"].items()}
    files["index.html"] = page.render(
        results["about"], results["suites"], results.get("earlier", {})
    )
    for name, content in files.items():
        # A damaged path may have a lone surrogate; the run must not be lost for that.
        write_durably(folder / name, content.encode("utf-8", "replace"))
    return [folder / name for name in files]


def _plain(value: object) -> Any:
    """Return the value in types that JSON has."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return pivot.number(float(value))
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value)


def _merged(new: dict, old: dict | None) -> dict:
    """Return the new results, and the old rows whose suite or operation the new ones lack."""
    if old is None:
        return new
    together, earlier = {**new["suites"]}, {}
    for suite, rows in old["suites"].items():
        fresh = together.get(suite) or []
        ops = {row.get("op") for row in fresh}
        kept = [row for row in rows if not fresh or row.get("op") not in ops]
        if kept:
            together[suite] = [*kept, *fresh]
            earlier |= _origins(suite, kept, old, whole=not fresh)
    order = [s for s in pivot.SUITES if s in together]
    order += sorted(s for s in together if s not in pivot.SUITES)
    merged = {"about": new["about"], "suites": {s: together[s] for s in order}}
    return {**merged, "earlier": earlier} if earlier else merged


def _origins(suite: str, kept: Sequence[Row], old: dict, whole: bool) -> dict[str, dict]:
    """Return the facts about the runs that rows come from, by suite if it is one run, else by op.

    old: the results that had the rows
    """
    before = old.get("earlier", {})
    ops = dict.fromkeys(text(row.get("op")) for row in kept)
    said = [before.get(f"{suite} {op}", before.get(suite, old["about"])) for op in ops]
    if whole and all(one == said[0] for one in said):
        return {suite: said[0]}
    return {f"{suite} {op}": one for op, one in zip(ops, said, strict=True)}


def _csv(suite: str, rows: Sequence[Row]) -> str:
    """Return the rows as CSV: numbers in full, nothing for None."""
    columns = COLUMNS.get(suite, "").split()
    columns += sorted({key for row in rows for key in row} - set(columns))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = (row.get(c) for c in columns)
        writer.writerow(text(v) if isinstance(v, list) else "" if v is None else v for v in cells)
    return out.getvalue()


def table(suite: str, rows: Sequence[dict]) -> str:
    """Return a suite as aligned text for a terminal, without a newline at its end.

    Suite kernels has for each op a line for every shape, dtype and direction, and a column for each
    implementation with its median in microseconds. Then come the widest spread, the speed of ours
    divided by that of the best other one, our TFLOP/s or GB/s and its per cent of the ceiling, and
    the errors of ours and of eager. Attention also compares ours with each vendor's.
    Suite tune has the tiles tried, and the rank correlation with their static bounds.

    suite, rows: name of the suite, and its rows; the remarks follow the table
    """
    if not rows:
        return f"{suite}: nothing was measured"
    makers: dict[str, Callable[[Sequence[dict]], str]] = {
        "kernels": _kernels, "decode": _decode, "tune": _tune
    }  # fmt: skip
    body = makers[suite](rows) if suite in makers else _columns(suite, rows)
    return "\n".join([body, *(f"  {said}" for said in pivot.remarks(suite, rows))])


def _aligned(header: Sequence[str], body: Sequence[Sequence[str]], left: int) -> str:
    """Return cells in columns that are not empty, the first `left` of them aligned to the left."""
    keep = [i for i in range(len(header)) if any(line[i] not in ("", "-") for line in body)]
    cells = [[line[i] for i in keep] for line in (header, *body)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = ["<" if i < left else ">" for i in keep]
    return "\n".join(
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths, strict=True)).rstrip()
        for line in cells
    )


def _value(line: pivot.Line, implementation: str) -> str:
    """Return a cell of a pivoted table: the number, or the text in its place."""
    return short(line.measured(implementation), pivot.missing(line.by.get(implementation, {})))


def _kernels(rows: Sequence[dict]) -> str:
    """Return a table for each op, because each has other implementations."""
    units = ("TFLOP/s", "GB/s")
    found = []
    for op, its in pivot.grouped(rows, "op").items():
        names = pivot.present(its)
        lines, body = [line for line in pivot.lines(its) if _has_content(line)], []
        for line in lines:
            rate, unit = pivot.rate(line.judged)
            cells = [*_case(line), *(_value(line, name) for name in names)]
            cells += [per_cent(_widest(line)), times(line.ratio)]
            cells += [short(rate if unit == one else None) for one in units]
            cells.append(per_cent(line.judged.get("percent_of_ceiling")))
            errors = (pivot.accuracy(r) for r in (line.ours, line.by.get("eager", {})))
            body.append([*cells, *errors])
        header = [*CASE, *names, "+-%", "vs best", *units, "%", "error", "eager's"]
        title = "median us; +-%: the widest spread"
        if any(line.best(ours=True) for line in lines):
            title += "; %: ours, of the ceiling"
        elif any(line.judged for line in lines):
            title += "; %: fastest, of ceiling"
        if not lines:
            found.append(f"{op}: nothing was measured")
            continue
        found.append(f"{op}, {title}\n{_aligned(header, body, len(CASE))}")
        against = [line for line in lines if op == "attention" and any(map(line.over, RIVALS))]
        if against:
            body = [
                [*_case(line), *(times(line.over(name)) for name in RIVALS)] for line in against
            ]
            found.append(f"{op}, times as fast as\n{_aligned([*CASE, *RIVALS], body, len(CASE))}")
    return "\n\n".join(found)


def _has_content(line: Line) -> bool:
    """Return whether anything on the line was measured, failed or was wrong."""
    return bool(pivot.present(line.by.values(), line.value))


def _case(line: Line) -> list[str]:
    """Return shape, dtype and direction, as fwd, bwd or fwd+bwd."""
    _, shape, dtype, way = line.case
    return [shape, dtype, pivot.brief(way)]


def _widest(line: Line) -> float | None:
    """Return the widest spread of a time on the line, in per cent of its median."""
    spreads = ((number(row.get("spread_us")), line.measured(n)) for n, row in line.by.items())
    return max((100 * s / us for s, us in spreads if s is not None and us), default=None)


def _tune(rows: Sequence[dict]) -> str:
    found = correlation.correlations(rows)
    ranks = f"\n\n{correlation.TITLE}\n{_columns('', found)}" if found else ""
    return _columns("tune", rows) + ranks


def _decode(rows: Sequence[dict]) -> str:
    names = pivot.implementations(rows)
    body = [
        [*line.case, *(_value(line, name) for name in names), times(line.ratio)]
        for line in pivot.lines(rows, ("batch", "context"), "tokens_per_s", higher=True)
        if _has_content(line)
    ]
    if not body:
        return "decode: nothing was measured"
    return "tokens/s\n" + _aligned(["batch", "context", *names, "vs best"], body, 0)


def _columns(suite: str, rows: Sequence[dict]) -> str:
    """Return a line for each row that has a measurement, with the columns of columns.py.

    An unknown suite has all rows and columns.
    """
    rows = pivot.worth_a_line(suite, rows)
    if not rows:
        return f"{suite}: nothing was measured"
    shown = SHOWN.get(suite) or {key: (key, text) for row in rows for key in row}
    left = next((i for i, k in enumerate(shown) if any(_numeric(r.get(k)) for r in rows)), 9)
    body = [[words(row.get(key)) for key, (_, words) in shown.items()] for row in rows]
    return _aligned([title for title, _ in shown.values()], body, left)


def _numeric(value: object) -> bool:
    return pivot.number(value) is not None
