"""Draw bars, a roofline and lines as inline SVG. CSS classes of the page give the colours."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise

from minillm.profiling.page.pivot import (
    CASE,
    Row,
    grouped,
    implementations,
    is_ours,
    number,
    per_cent,
    short,
    text,
)

# A shape for each implementation, besides its colour, for readers who cannot see the colours.
SHAPES = {
    "eager": "M-4-4H4V4H-4Z",
    "compile": "M0-5.5 5.5 0 0 5.5-5.5 0Z",
    "flash": "M0-5 5 4H-5Z",
    "cudnn": "M0 5 5-4H-5Z",
    "efficient": "M-1.7-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
    "vendor": "M-2.5-5H2.5L5 0 2.5 5H-2.5L-5 0Z",
    "triton": "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z",
    "other": "M-5-2.5H5V2.5H-5Z",
}


def kind(implementation: str) -> str:
    """Return the CSS class of an implementation, "other" if it has none."""
    name = "triton" if is_ours(implementation) else implementation
    return name if name in SHAPES else "other"


def _marker(implementation: str) -> str:
    which = kind(implementation)
    return f'<path class="mark {which}" d="{SHAPES[which]}"/>'


def legend(names: Iterable[str]) -> str:
    """Return the marker and the name of each implementation."""
    items = (
        f'<li><svg viewBox="-7 -7 14 14" width="14" height="14" aria-hidden="true">'
        f"{_marker(name)}</svg>{escape(name)}</li>"
        for name in names
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def figure(words: str, svg: str) -> str:
    """Return a figure under its title.

    words: the title
    svg: the drawing
    """
    return f"<figure><figcaption>{escape(words)}</figcaption>{svg}</figure>"


def _svg(css: str, width: float, height: float, label: str, parts: Iterable[str]) -> str:
    return (
        f'<svg class="{css}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, words: str, css: str = "", more: str = "") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}"{more}>{escape(words)}</text>'


def bars(label: str, items: Sequence[tuple[str, float | None, str, str]]) -> str:
    """Return horizontal bars from zero, each between its name and its value.

    label: text for screen readers
    items: implementation, value (None if it was not measured), the value as text, and the text that
        shows when the pointer is on the bar
    """
    left, right, step = 82, 292, 22
    top = max((value for _, value, _, _ in items if value is not None), default=0) or 1
    parts = []
    for i, (name, value, words, hint) in enumerate(items):
        middle = step * i + step / 2
        width = (right - left) * max(value or 0, 0) / top
        bar = (
            f'<rect class="bar {kind(name)}" x="{left}" y="{middle - 7:g}" '
            f'width="{max(width, 1):.1f}" height="14" rx="2"/>'
        )
        parts += [
            f"<g><title>{escape(hint)}</title>",
            _text(left - 6, middle + 4, name if len(name) < 13 else name[:12] + "…", "name"),
            bar if value is not None else "",
            _text(left + (width + 5 if value is not None else 0), middle + 4, words, "value"),
            "</g>",
        ]
    return _svg("bars", 364, step * max(len(items), 1), label, parts)


class _Decades:
    """Positions along a logarithmic axis of whole decades between two pixels."""

    def __init__(self, values: Iterable[float], start: float, end: float):
        found = [math.log10(v) for v in values]
        self.first = math.floor(min(found, default=0.0))
        self.last = max(math.ceil(max(found, default=1.0)), self.first + 1)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        part = (math.log10(value) - self.first) / (self.last - self.first)
        return self.start + part * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        return [10.0**n for n in range(self.first, self.last + 1)]

    @property
    def low(self) -> float:
        return 10.0**self.first


def _tick(value: float) -> str:
    """Return a number at an axis, in full."""
    return f"{value:.0f}" if value >= 1 and value == int(value) else f"{value:g}"


def _positive(value: object) -> float | None:
    x = number(value)
    return x if x is not None and x > 0 else None


def _dots(rows: Iterable[Row]) -> list[tuple[float, float, Row]]:
    """Return intensity, TFLOP/s and row of each measurement; ours last, so that they are on top."""
    found = []
    for row in rows:
        x, y = _positive(row.get("intensity")), _positive(row.get("tflops"))
        if x is not None and y is not None:
            found.append((x, y, row))
    return sorted(found, key=lambda dot: is_ours(text(dot[2].get("implementation"))))


def roofline(rows: Iterable[Row], ceilings: dict[str, object]) -> str:
    """Return speed against arithmetic intensity, both logarithmic; "" if there is no dot.

    A memory roof is min(intensity * bandwidth, compute roof). There is one for the memory and one
    for each working set of a row. Each NAME_tflops of the ceilings is a compute roof. A dot above
    its roof is drawn where it was measured.
    Source: Williams, Waterman & Patterson 2009, figure 1.

    rows: rows of the suite
    ceilings: measured ceilings of the machine, see ceilings.ceilings
    """
    dots = _dots(rows)
    if not dots:
        return ""
    roofs = {
        name.removesuffix("_tflops"): height
        for name, value in ceilings.items()
        if name.endswith("_tflops") and (height := _positive(value)) is not None
    }
    slopes = _slopes(rows, ceilings)
    ridges = [height / slope for height in roofs.values() for slope in slopes.values()]
    x = _Decades([*(d[0] for d in dots), *ridges, *(1.5 * r for r in ridges)], 56, 744)
    y = _Decades([*(d[1] for d in dots), *roofs.values()], 412, 20)
    parts = [*_grid(x, y), *_roofs(x, y, slopes, roofs)]
    for intensity, tflops, row in dots:
        name = text(row.get("implementation"))
        hint = (
            f"{' '.join(text(row.get(key)) for key in CASE)}, {name}: {short(tflops)} TFLOP/s at "
            f"{short(intensity)} FLOP/byte, {per_cent(row.get('percent'))} % of "
            f"{short(row.get('attainable_tflops'))} attainable{_named(row)}"
        )
        parts.append(
            f'<g class="dot" transform="translate({x(intensity):.2f} {y(tflops):.2f})">'
            f'<title>{escape(hint)}</title><circle class="target" r="9"/>{_marker(name)}</g>'
        )
    return _svg("roofline", 760, 456, "Roofline: TFLOP/s against FLOP per byte", parts)


def _named(row: Row) -> str:
    """Return the name of a row's roof, if it is known."""
    return f" ({text(row['roof'])})" if row.get("roof") else ""


def _slopes(rows: Iterable[Row], ceilings: dict[str, object]) -> dict[str, float]:
    """Return TFLOP/s at one FLOP for each byte, by the name of a memory roof, the slowest first.

    Roofs of working sets are those of the rows. Of roofs that would overlap in the figure only the
    highest is drawn, so that dots are not above their line for that reason.
    """
    found: dict[str, float] = {}
    if gbps := _positive(ceilings.get("memory_gbps")):
        found["memory"] = gbps / 1e3
    for row in rows:
        name, top = text(row.get("roof")), _positive(row.get("attainable_tflops"))
        intensity = _positive(row.get("intensity"))
        if name not in ("", "compute") and top and intensity:
            found.setdefault(name, top / intensity)
    ordered = sorted(found.items(), key=lambda item: item[1])
    apart = [
        one for one, higher in pairwise([*ordered, ("", math.inf)])
        if one[0] == "memory" or higher[1] > 1.6 * one[1]
    ]  # fmt: skip
    return dict(apart)


def _grid(x: _Decades, y: _Decades) -> list[str]:
    parts = []
    for tick in x.ticks:
        parts.append(f'<path class="grid" d="M{x(tick):.1f} {y.start:g}V{y.end:g}"/>')
        parts.append(_text(x(tick), y.start + 17, _tick(tick), "tick middle"))
    for tick in y.ticks:
        parts.append(f'<path class="grid" d="M{x.start:g} {y(tick):.1f}H{x.end:g}"/>')
        parts.append(_text(x.start - 7, y(tick) + 4, _tick(tick), "tick end"))
    parts.append(_text((x.start + x.end) / 2, y.start + 37, "FLOP per byte", "tick middle"))
    return [*parts, _text(x.start, y.end - 8, "TFLOP/s", "tick")]


def _roofs(
    x: _Decades, y: _Decades, slopes: dict[str, float], roofs: dict[str, float]
) -> list[str]:
    """Return lines with their names along them."""
    parts = []
    right = 10.0**x.last
    for name, slope in slopes.items():
        start = max(x.low, y.low / slope)
        end = min(right, max(roofs.values(), default=10.0**y.last) / slope)
        a, b = (x(start), y(start * slope)), (x(end), y(end * slope))
        parts.append(_roof(name, a, b))
        angle = math.degrees(math.atan2(b[1] - a[1], b[0] - a[0]))
        turn = f' transform="rotate({angle:.1f} {a[0]:.1f} {a[1]:.1f}) translate(14 -5)"'
        parts.append(_text(*a, f"{name}, {short(1e3 * slope)} GB/s", "roofname", turn))
    steepest = max(slopes.values(), default=0.0)
    for name, height in roofs.items():
        start = min(max(height / steepest, x.low), right) if steepest else x.low
        parts.append(_roof(name, (x(start), y(height)), (x(right), y(height))))
        words = f"{name}, {short(height)} TFLOP/s"
        parts.append(_text(x(right), y(height) - 6, words, "roofname end"))
    return parts


def _roof(name: str, a: tuple[float, float], b: tuple[float, float]) -> str:
    return (
        f'<line class="roof" data-roof="{escape(name)}" x1="{a[0]:.2f}" y1="{a[1]:.2f}" '
        f'x2="{b[0]:.2f}" y2="{b[1]:.2f}"/>'
    )


def decode(rows: Sequence[Row]) -> str:
    """Return tokens a second against context, a line for each implementation; "" without a point.

    The axis of the context is logarithmic, because the context doubles from one point to the next.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    by_name = grouped(rows, "implementation")
    for name in implementations(rows):
        for row in by_name[name]:
            a, b = _positive(row.get("context")), _positive(row.get("tokens_per_s"))
            if a is not None and b is not None:
                curves.setdefault(name, []).append((a, b))
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    contexts = sorted({a for a, _ in points})
    low, high = math.log2(contexts[0]), math.log2(contexts[-1])
    top = _nice(max(b for _, b in points))

    def x(a: float) -> float:
        return 62 + 276 * (math.log2(a) - low) / (high - low) if high > low else 200

    def y(b: float) -> float:
        return 200 - 176 * b / top

    parts = [_text(8, 12, "tokens/s", "tick"), _text(200, 236, "context", "tick middle")]
    for tick in (0, top / 2, top):
        parts.append(f'<path class="grid" d="M56 {y(tick):.1f}H346"/>')
        parts.append(_text(50, y(tick) + 4, _tick(tick), "tick end"))
    shown = contexts if len(contexts) < 7 else contexts[:: math.ceil(len(contexts) / 6)]
    parts += [_text(x(a), 218, _tick(a), "tick middle") for a in shown]
    for name, curve in curves.items():
        curve.sort()
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in curve)
        parts.append(f'<path class="curve {kind(name)}" d="M{path}"/>')
        for a, b in curve:
            hint = f"{name}, context {a:g}: {short(b)} tokens/s"
            parts.append(
                f'<g class="dot" transform="translate({x(a):.2f} {y(b):.2f})">'
                f'<title>{escape(hint)}</title><circle class="target" r="9"/>{_marker(name)}</g>'
            )
    return _svg("curves", 364, 244, "Tokens per second against context", parts)


def _nice(value: float) -> float:
    """Return the least of 1, 2, 4, 5, 8, 10 times a power of ten that is not below the value."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(n * power for n in (1, 2, 4, 5, 8, 10) if n * power >= value * 0.9999)
