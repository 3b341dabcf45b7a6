"""Render a profile as one HTML page that loads nothing from the network."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from math import exp, log

from minillm.profiling.page import calls, correlation, pivot, plot
from minillm.profiling.page.columns import SHOWN
from minillm.profiling.page.pivot import (
    RIVALS,
    Line,
    Row,
    number,
    per_cent,
    short,
    size,
    text,
    times,
)
from minillm.profiling.page.style import SCRIPT, STYLE
from minillm.profiling.page.tables import Cell, cell, ratio, speedup, table


def render(
    about: dict, suites: dict[str, list[dict]], earlier: dict[str, dict] | None = None
) -> str:
    """Return the page of a run's results.

    about, suites: see report.write; any suite or value may be missing
    earlier: facts about the machine of another run, by the suite whose rows come from it, or by
        "SUITE OP" for the rows of one operation
    """
    earlier = earlier or {}
    known = {name: suites.get(name) or [] for name in pivot.SUITES}
    other = {name: rows for name, rows in suites.items() if name not in known and rows}
    makers = {"kernels": _kernels, "model": _model, "decode": _decode, "audit": _audit}
    makers["tune"] = _tune
    # Suites with measurements come first.
    shown = {name: rows for name, rows in {**known, **other}.items() if rows}
    shown = dict(sorted(shown.items(), key=lambda item: not pivot.worth_a_line(*item)))
    parts = []
    for name, rows in shown.items():
        if name == "roofline":
            made = _roofline(rows, about, earlier)
        else:
            made = makers.get(name, _plain)(rows)
        parts.append(_section(name, _origin(name, earlier, about) + made))
    device = text(about.get("device")) or "device unknown"
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # This makes the browser refuse to load anything for the page.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">"
        '<link rel="icon" href="data:,">'
        f"<title>minillm profile, {escape(device)}</title><style>{STYLE}</style></head>\n"
    )
    links = "".join(f'<a href="#{_id(name)}">{escape(name)}</a>' for name in shown)
    return (
        f"{head}<body><header><p>minillm profile</p><h1>{escape(device)}</h1>"
        f'<nav>{links}<a href="#remarks">remarks</a></nav></header>\n<main>'
        f"{_section('machine', calls.section(about, shown, earlier))}\n{''.join(parts)}"
        f"{_section('remarks', _remarks({**known, **other}))}</main>\n"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _id(*words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-") or "x"


def _section(name: str, content: str) -> str:
    title = escape(name[:1].upper() + name[1:])
    return f'<section id="{_id(name)}"><h2>{title}</h2>\n{content}</section>\n'


def _origin(name: str, earlier: Mapping[str, dict], about: dict) -> str:
    """Return a warning over a suite, or an operation's rows, from another machine or commit."""
    found = ""
    for key, facts in earlier.items():
        suite, _, op = key.partition(" ")
        unlike = [key for key in calls.MACHINE if facts.get(key) != about.get(key)]
        if suite == name and unlike:
            words = ", ".join(f"{key} {text(facts.get(key)) or 'unknown'}" for key in unlike)
            when = f" ({text(facts['date'])})" if facts.get("date") else ""
            run = f"{op}: from another run{when}" if op else f"From another run{when}"
            found += f'<p class="warn">{escape(f"{run}: {words}.")}</p>'
    return found


def _kernels(rows: Sequence[Row]) -> str:
    """Return a summary, and the bars and the table of each operation."""
    summary, parts, links = [], [], []
    for op, its in pivot.grouped(rows, "op").items():
        found = pivot.lines(its)
        ratios = sorted(r for line in found if (r := line.ratio) is not None)
        shares = (number(line.judged.get("percent_of_ceiling")) or 0 for line in found)
        best = max(shares, default=0)
        mean = exp(sum(map(log, ratios)) / len(ratios)) if ratios else None
        spread = [ratios[0], mean, ratios[-1]] if ratios else [None] * 3
        wins = Counter(name for line in found if (name := line.fastest))
        summary.append(
            [cell(op), cell(str(len(found)), len(found))]
            + [cell(", ".join(f"{name} {n}" for name, n in wins.most_common()))]
            + [*(cell(times(r), r) for r in spread), cell(per_cent(best or None), best or None)]
        )
        links.append(f'<a href="#{_id("op", op)}">{escape(op)}</a>')
        parts.append(
            f'<h3 id="{_id("op", op)}">{escape(op)}</h3>{plot.legend(pivot.present(its))}'
            f"{_cases(found)}{_pivoted(found, its)}{_against(found) if op == 'attention' else ''}"
        )
    header = ["op", "cases", "fastest in", "least", "mean", "most", "best % of ceiling"]
    ours = (
        "A ratio says how many times as fast as the best other implementation Triton's kernel is, "
        "over the cases of an op; the mean is geometric. "
    ) * any(pivot.is_ours(name) for name in pivot.present(rows))
    return (
        f"<p>Median times on the device. {ours}Speed and share of the ceiling are those of "
        "Triton's kernel where it was timed, else of the fastest implementation.</p>"
        f"{table(header, summary)}<nav>{''.join(links)}</nav>{''.join(parts)}"
    )


def _against(found: Sequence[Line]) -> str:
    """Return ours against each vendor's, cell by cell; "" if there is nothing to compare."""
    body = [
        [*map(cell, line.case[1:]), *(speedup(line.over(name)) for name in RIVALS)]
        for line in found
        if any(map(line.over, RIVALS))
    ]
    made = table(["shape", "dtype", "pass", *RIVALS], body)
    return f"<p>Times as fast as:</p>{made}" if made else ""


def _cases(found: Sequence[Line], shown: int = 6) -> str:
    """Return the bars of each case; those after the first few are folded."""
    figures = []
    for line in found:
        words = " ".join(w for w in line.case[1:] if w)
        items = []
        for name in pivot.present(line.by.values()):
            row, value = line.by[name], line.measured(name)
            hint = (
                f"{name}: {pivot.duration(value)}, spread {pivot.spread(row.get('spread_us'))} us, "
            )
            hint += f"{pivot.speed(row)}, {per_cent(row.get('percent_of_ceiling'))} % of ceiling, "
            hint += f"peak {size(row.get('peak_bytes'))}"
            failed = pivot.missing(row).replace("-", "not measured")
            items.append((name, value, pivot.duration(value, failed), hint))
        if items:
            figures.append(plot.figure(words, plot.bars(f"{line.case[0]} {words}", items)))
    first, rest = "".join(figures[:shown]), "".join(figures[shown:])
    more = f"<summary>{len(figures) - shown} more cases</summary>"
    return f'<div class="figures">{first}</div>' + (
        f'<details>{more}<div class="figures">{rest}</div></details>' if rest else ""
    )


def _measured(line: Line, name: str) -> Cell:
    value = line.measured(name)
    return cell(short(value, pivot.missing(line.by.get(name, {}))), value)


def _pivoted(found: Sequence[Line], rows: Sequence[Row]) -> str:
    names = pivot.present(rows)
    header = ["shape", "dtype", "pass", *(f"{name} us" for name in names), "vs best"]
    header += ["speed", "% of ceiling", "ceiling", "peak, triton", "peak, least other"]
    header += ["error, triton", "error, eager"]
    body = []
    for line in found:
        if not any(name in names for name in pivot.present(line.by.values())):
            continue  # nothing was measured; the remarks say why
        ours, judged = line.ours, line.judged
        share, peak = judged.get("percent_of_ceiling"), ours.get("peak_bytes")
        others = [number(r.get("peak_bytes")) for n, r in line.by.items() if not pivot.is_ours(n)]
        least = min((x for x in others if x is not None), default=None)
        cells = [cell(word) for word in line.case[1:]]
        cells += [_measured(line, name) for name in names]
        cells += [ratio(line), cell(pivot.speed(judged)), cell(per_cent(share), share)]
        cells += [cell("-" if number(share) is None else text(judged.get("ceiling")))]
        cells += [cell(size(peak), peak), cell(size(least), least)]
        errors = (ours, line.by.get("eager", {}))
        body.append([*cells, *(cell(pivot.accuracy(r), r.get("error")) for r in errors)])
    return table(header, body)


def _plain(rows: Sequence[Row], suite: str = "", css: str = "") -> str:
    """Return a table with a line for each row that has more than names.

    A known suite has the columns of columns.py, an unknown one has all.
    """
    shown = SHOWN.get(suite) or {key: (str(key), text) for row in rows for key in row}
    wide = any(pivot.failure(row) for row in rows) and "error" not in shown
    body = []
    for row in pivot.worth_a_line(suite, rows):
        cells = [
            cell(write(row.get(key)) or "-", row.get(key)) for key, (_, write) in shown.items()
        ]
        body.append(cells + [cell(pivot.failure(row), None, "lose")] * wide)
    return table([title for title, _ in shown.values()] + ["error"] * wide, body, css)


def _tune(rows: Sequence[Row]) -> str:
    found = correlation.correlations(rows)
    ranks = f"<p>{correlation.TITLE}:</p>{_plain(found)}" if found else ""
    return ranks + _plain(rows, "tune", "tall")


def _model(rows: Sequence[Row]) -> str:
    items = []
    for row in pivot.worth_a_line("model", rows):
        value = number(row.get("step_ms"))
        words = f"{short(value)} ms" if value is not None else "not measured"
        name = text(row.get("implementation"))
        hint = f"{name}: {words}, spread {pivot.spread(row.get('spread_ms'))} ms"
        items.append((name, value, words, hint))
    figure = plot.figure("Time of a step", plot.bars("Time of a step", items)) if items else ""
    return (
        "<p>One training step: forward, backward, update.</p>"
        f'<div class="figures">{figure}</div>{_plain(rows, "model")}'
    )


def _decode(rows: Sequence[Row]) -> str:
    names = pivot.present(rows, "tokens_per_s")
    figures = (
        plot.figure(f"batch {batch}", svg)
        for batch, its in pivot.grouped(rows, "batch").items()
        if (svg := plot.decode(its))
    )
    body = []
    for line in pivot.lines(rows, ("batch", "context"), "tokens_per_s", higher=True):
        row = next(iter(line.by.values()))
        if not any(map(line.measured, line.by)):
            continue
        cells = [cell(text(row.get(key)) or "-", row.get(key)) for key in ("batch", "context")]
        body.append([*cells, *(_measured(line, name) for name in names), ratio(line)])
    header = ["batch", "context", *(f"{name} tokens/s" for name in names), "vs best"]
    return f'{plot.legend(names)}<div class="figures">{"".join(figures)}</div>' + table(
        header, body
    )


def _roofline(rows: Sequence[Row], about: dict, earlier: Mapping[str, dict]) -> str:
    """Return a figure for each call's ceilings with the dots that it measured, and a table."""
    groups: list[tuple[dict, list[Row]]] = []
    for row in rows:
        call = calls.of_row("roofline", text(row.get("op")), about, earlier)
        same = (its for one, its in groups if one.get("ceilings") == call.get("ceilings"))
        its = next(same, None)
        if its is None:
            groups.append((call, its := []))
        its.append(row)
    figures = ""
    for call, its in groups:
        roofs = call.get("ceilings") or about.get("ceilings")
        if svg := plot.roofline(its, dict(roofs) if isinstance(roofs, Mapping) else {}):
            title = f"<p>{escape(text(call.get('date')))}:</p>" if len(groups) > 1 else ""
            figures += f'{title}<div class="scroll"><div class="wide">{svg}</div></div>'
    words = (
        "<p>The memory roof of a dot is the bandwidth that was measured with data of its size, "
        "which may lie in a cache. Attainable is what both roofs allow.</p>"
    )
    names = plot.legend(pivot.present(rows, "tflops"))
    return words + names + figures + _plain(rows, "roofline", "tall")


def _audit(rows: Sequence[Row]) -> str:
    return (
        "<p>Read off the machine code, compiled ahead for each architecture; no time was measured. "
        "A bound is what the instructions of the hot loop allow at most.</p>"
        + _plain(rows, "audit", "tall")
    )


def _remarks(suites: Mapping[str, Sequence[Row]]) -> str:
    """Return what was not measured, and why."""
    parts = []
    for name, rows in suites.items():
        remarks = pivot.remarks(name, rows) if rows else ["this suite was not measured"]
        items = "".join(f"<li>{escape(one)}</li>" for one in remarks)
        parts += [f"<h3>{escape(name)}</h3><ul>{items}</ul>"] if remarks else []
    return "".join(parts) or "<p>Everything was measured, and nothing was remarked.</p>"
