"""Put measurements side by side, a line for each case, and format their numbers.

A value that is None, or not finite, was not measured; as text it is "-".
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Row = dict[str, object]

SUITES = ("kernels", "model", "decode", "roofline", "audit")
CASE = ("op", "shape", "dtype", "direction")
# The main value of a row of each suite; if it is None, the row was not measured.
VALUE = {
    "kernels": "median_us",
    "model": "step_ms",
    "decode": "tokens_per_s",
    "roofline": "tflops",
    "audit": "registers",
}
ORDER = ("eager", "compile", "flash", "cudnn", "efficient", "vendor")
RIVALS = ("flash", "cudnn", "efficient")  # the vendors' attentions, with which ours is compared
WRONG = "wrong numbers"  # first words of the note of a row with wrong results
SPEEDS = ("median_us", "spread_us", "tflops", "gbps", "percent_of_ceiling")


def number(value: object) -> float | None:
    """Return the value as a finite float; None for everything else, also for True and "1.5"."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def text(value: object) -> str:
    """Return a cell as text: "" for None, 8x1024 for a sequence, a number in short."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return "x".join(str(v) for v in value)
    if isinstance(value, float):
        return short(value)
    return str(value)


def short(value: object, missing: str = "-") -> str:
    """Return a number in three figures or more, with an exponent only if it is tiny.

    value, missing: the number, and the text in its place if there is none
    """
    x = number(value)
    if x is None:
        return missing
    if x == 0 or abs(x) >= 99.95:
        return f"{x:.0f}"
    if abs(x) >= 9.995:
        return f"{x:.1f}"
    return f"{x:.2f}" if abs(x) >= 0.9995 else f"{x:#.3g}"


def size(value: object) -> str:
    """Return bytes as B, KiB, MiB or GiB."""
    x = number(value)
    if x is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if abs(x) < 1024:
            return f"{short(x)} {unit}"
        x /= 1024
    return f"{short(x)} GiB"


def duration(us: object, missing: str = "-") -> str:
    """Return microseconds as us, ms or s.

    us, missing: the microseconds, and the text in their place if there are none
    """
    x = number(us)
    if x is None:
        return missing
    if x < 1e3:
        return f"{short(x)} us"
    return f"{short(x / 1e3)} ms" if x < 1e6 else f"{short(x / 1e6)} s"


def share(value: object) -> str:
    """Return a share of one as per cent."""
    x = number(value)
    return per_cent(None if x is None else 100 * x)


def failure(row: Row) -> str:
    """Return why a row has no measurement; a number there, in the suite kernels, is an accuracy."""
    said = row.get("error")
    return said.strip() if isinstance(said, str) else ""


def missing(row: Row) -> str:
    """Return the text in place of a missing speed: "wrong", "failed" or "-" for not measured."""
    if text(row.get("note")).startswith(WRONG):
        return "wrong"
    return "failed" if failure(row) else "-"


def accuracy(row: Row) -> str:
    """Return the relative error against float64, as 1.2e-07."""
    x = number(row.get("error"))
    return "-" if x is None else f"{x:.1e}" if x else "0"


def brief(direction: object) -> str:
    """Return a direction as fwd, bwd or fwd+bwd."""
    return text(direction).replace("forward", "fwd").replace("backward", "bwd")


def spread(value: object) -> str:
    """Return a spread as text: one number, or a pair as low..high."""
    return "..".join(map(short, value)) if isinstance(value, list | tuple) else short(value)


def is_ours(implementation: str) -> bool:
    """Return whether it is one of our kernels: "triton", or a variant such as "triton_tma"."""
    return implementation.startswith("triton")


def implementations(rows: Iterable[Row]) -> list[str]:
    """Return the names: eager, compile and vendors first, unknown ones next, ours last."""
    names = {text(row.get("implementation")) for row in rows}
    known = [name for name in ORDER if name in names]
    strangers = sorted(n for n in names if n not in ORDER and not is_ours(n))
    return known + strangers + sorted(n for n in names if is_ours(n))


def measured(row: Row, value: str) -> float | None:
    """Return the value under a key if it is a positive number, else None.

    row, value: the row, and the key of the value
    """
    x = number(row.get(value))
    return x if x is not None and x > 0 else None


def present(rows: Iterable[Row], value: str = "median_us") -> list[str]:
    """Return, in order, the implementations that were measured, failed or were wrong.

    rows, value: rows of any cases, and the key of the value
    """
    return implementations(row for row in rows if measured(row, value) or missing(row) != "-")


def worth_a_line(suite: str, rows: Iterable[Row]) -> list[Row]:
    """Return the rows with a measurement or a failure. Of an unknown suite, return all rows.

    suite, rows: name of the suite, and its rows
    """
    if suite not in VALUE:
        return list(rows)
    return [row for row in rows if number(row.get(VALUE[suite])) is not None or failure(row)]


@dataclass(frozen=True)
class Line:
    """One case: its names, and its row for each implementation; value and higher: see `lines`."""

    case: tuple[str, ...]
    by: dict[str, Row]
    value: str = "median_us"
    higher: bool = False

    def measured(self, implementation: str) -> float | None:
        """Return the value of one implementation if it was measured and is positive."""
        return measured(self.by.get(implementation, {}), self.value)

    def best(self, ours: bool) -> str | None:
        """Return the fastest measured implementation, of ours or of the others."""
        names = [n for n in self.by if is_ours(n) == ours and self.measured(n) is not None]
        return self._fastest_of(names)

    @property
    def ours(self) -> Row:
        """Return our row: the fastest of ours, else one that failed, else an empty one."""
        failed = next((n for n in sorted(self.by) if is_ours(n)), "")
        return self.by.get(self.best(ours=True) or failed, {})

    @property
    def fastest(self) -> str | None:
        """Return the fastest measured implementation of all."""
        return self._fastest_of([name for ours in (True, False) if (name := self.best(ours))])

    def _fastest_of(self, names: list[str]) -> str | None:
        pick = max if self.higher else min
        return pick(names, key=lambda n: self.measured(n) or 0.0, default=None)

    @property
    def judged(self) -> Row:
        """Return the row whose speed is shown: ours if it was tried, else the fastest other one."""
        if self.best(ours=True) or missing(self.ours) != "-":
            return self.ours
        return self.by.get(self.fastest or "", {})

    @property
    def ratio(self) -> float | None:
        """Return the speed of ours divided by that of the best other implementation."""
        return self.over(self.best(ours=False) or "")

    def over(self, other: str) -> float | None:
        """Return the speed of ours divided by another's, if both were measured."""
        a, b = self.measured(self.best(ours=True) or ""), self.measured(other)
        if a is None or b is None:
            return None
        return a / b if self.higher else b / a


def lines(
    rows: Iterable[Row],
    keys: Sequence[str] = CASE,
    value: str = "median_us",
    higher: bool = False,
) -> list[Line]:
    """Return a line for each case in order of first appearance, without speeds of wrong results.

    rows: rows of a suite; of two for the same case and implementation the last counts
    keys: keys that name a case
    value, higher: key of the value that is compared, and whether larger values are better
    """
    found: dict[tuple[str, ...], Line] = {}
    for row in rows:
        case = tuple(text(row.get(key)) for key in keys)
        line = found.setdefault(case, Line(case, {}, value, higher))
        if missing(row) == "wrong":
            row = {**row, **dict.fromkeys(SPEEDS)}
        line.by[text(row.get("implementation"))] = row
    return list(found.values())


def grouped(rows: Iterable[Row], key: str) -> dict[str, list[Row]]:
    """Return the rows by the text of one key, in order of first appearance.

    rows, key: the rows, and the key
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(text(row.get(key)), []).append(row)
    return found


def rate(row: Row) -> tuple[float | None, str]:
    """Return a row's speed and its unit, TFLOP/s or GB/s, that of its ceiling."""
    tflops, gbps = number(row.get("tflops")), number(row.get("gbps"))
    if gbps is not None and (row.get("ceiling") == "memory" or tflops is None):
        return gbps, "GB/s"
    return tflops, "TFLOP/s"


def speed(row: Row) -> str:
    """Return the rate as text."""
    value, unit = rate(row)
    return "-" if value is None else f"{short(value)} {unit}"


def per_cent(value: object) -> str:
    """Return per cent as text, whole from ten on."""
    x = number(value)
    return "-" if x is None else f"{x:.0f}" if x >= 9.5 else f"{x:.1f}"


def times(value: object) -> str:
    """Return a ratio as 1.24x."""
    x = number(value)
    return "-" if x is None else f"{x:.2f}x"


def remarks(suite: str, rows: Iterable[Row]) -> list[str]:
    """Return the notes of all rows, each once; a row that was not measured says why.

    suite, rows: name of the suite, and its rows
    """
    first: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        said = "; ".join(s for s in (failure(row), text(row.get("note")).strip()) if s)
        if number(row.get(VALUE.get(suite, ""))) is None and suite in VALUE:
            said = f"not measured: {said or 'no reason was recorded'}"
        if not said:
            continue
        who = ("kernel", "op") if suite in ("audit", "tune") else ("implementation",)
        subject = " ".join(text(row.get(k)) for k in who if row.get(k))
        where = " ".join(
            text(row.get(k))
            for k in ("op", "shape", "dtype", "direction", "arch", "config", "size", "options")
            if row.get(k) and k not in who
        )
        if suite == "decode":
            where = f"batch {text(row.get('batch'))}, context {text(row.get('context'))}"
        first.setdefault((subject, said), []).append(where)
    return [f"{subject}{_cases(where)}: {said}" for (subject, said), where in first.items()]


def _cases(where: list[str]) -> str:
    more = f" and {len(where) - 1} more" if len(where) > 1 else ""
    return f" ({where[0]}{more})" if where[0] else ""
