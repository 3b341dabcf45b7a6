"""Rows of measurements put side by side: a line for each case, a column for each implementation.

Also how a number is written for a reader. A value that is None, or not finite, was not measured.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Row = dict[str, object]

SUITES = ("kernels", "model", "decode", "roofline", "audit")
CASE = ("op", "shape", "dtype", "direction")
# What a row of each suite is there to tell; None there means that it was not measured.
VALUE = {
    "kernels": "median_us",
    "model": "step_ms",
    "decode": "tokens_per_s",
    "roofline": "tflops",
    "audit": "registers",
}
ORDER = ("eager", "compile", "flash", "cudnn", "efficient", "vendor")
RIVALS = ("flash", "cudnn", "efficient")  # whom ours is to beat in attention
WRONG = "wrong numbers"  # how the note begins of a row whose results are no results
SPEEDS = ("median_us", "spread_us", "tflops", "gbps", "percent_of_ceiling")


def number(value: object) -> float | None:
    """The value as a finite float; None for everything else, True and "1.5" among it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def text(value: object) -> str:
    """One cell in words: "" for None, 8x1024 for a sequence, a number short."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return "x".join(str(v) for v in value)
    if isinstance(value, float):
        return short(value)
    return str(value)


def short(value: object, missing: str = "-") -> str:
    """A number in three figures or more, never with an exponent unless it is tiny."""
    x = number(value)
    if x is None:
        return missing
    if x == 0 or abs(x) >= 99.95:
        return f"{x:.0f}"
    if abs(x) >= 9.995:
        return f"{x:.1f}"
    return f"{x:.2f}" if abs(x) >= 0.9995 else f"{x:#.3g}"


def size(value: object, missing: str = "-") -> str:
    """Bytes as B, KiB, MiB or GiB."""
    x = number(value)
    if x is None:
        return missing
    for unit in ("B", "KiB", "MiB"):
        if abs(x) < 1024:
            return f"{short(x)} {unit}"
        x /= 1024
    return f"{short(x)} GiB"


def duration(us: object, missing: str = "-") -> str:
    """Microseconds as us, ms or s."""
    x = number(us)
    if x is None:
        return missing
    if x < 1e3:
        return f"{short(x)} us"
    return f"{short(x / 1e3)} ms" if x < 1e6 else f"{short(x / 1e6)} s"


def share(value: object) -> str:
    """A share of one as per cent."""
    x = number(value)
    return per_cent(None if x is None else 100 * x)


def failure(row: Row) -> str:
    """Why a row has no measurement; in the kernels suite a number of that name is an accuracy."""
    said = row.get("error")
    return said.strip() if isinstance(said, str) else ""


def missing(row: Row) -> str:
    """What stands where a speed would: "wrong", "failed" or, simply not measured, "-"."""
    if text(row.get("note")).startswith(WRONG):
        return "wrong"
    return "failed" if failure(row) else "-"


def accuracy(row: Row) -> str:
    """The relative error against float64, as 1.2e-07."""
    x = number(row.get("error"))
    return "-" if x is None else f"{x:.1e}" if x else "0"


def exact(value: object) -> str:
    """A number with four digits after the point, as a loss is compared."""
    x = number(value)
    return "-" if x is None else f"{x:.4f}"


def brief(direction: object) -> str:
    """A direction as fwd, bwd or fwd+bwd."""
    return text(direction).replace("forward", "fwd").replace("backward", "bwd")


def spread(value: object) -> str:
    """A spread: one number, or a pair as low..high."""
    if isinstance(value, list | tuple):
        return "..".join(short(v) for v in value)
    return short(value)


def is_ours(implementation: str) -> bool:
    """Whether it is this project's kernels: "triton", or a variant such as "triton_tma"."""
    return implementation.startswith("triton")


def implementations(rows: Iterable[Row]) -> list[str]:
    """Their names: eager, compile and the vendors first, strangers next, ours last."""
    names = {text(row.get("implementation")) for row in rows}
    known = [name for name in ORDER if name in names]
    strangers = sorted(n for n in names if n not in ORDER and not is_ours(n))
    return known + strangers + sorted(n for n in names if is_ours(n))


def measured(row: Row, value: str) -> float | None:
    """Return what was measured under the key `value` if it is positive, else None."""
    x = number(row.get(value))
    return x if x is not None and x > 0 else None


def present(rows: Iterable[Row], value: str = "median_us") -> list[str]:
    """Return the implementations, in order, of which anything was measured, failed or was wrong."""
    known = [row for row in rows if measured(row, value) or missing(row) != "-"]
    return implementations(known)


def worth_a_line(suite: str, rows: Iterable[Row]) -> list[Row]:
    """Return the rows that hold a measurement, or a failure; of an unknown suite all of them."""
    if suite not in VALUE:
        return list(rows)
    return [row for row in rows if number(row.get(VALUE[suite])) is not None or failure(row)]


@dataclass(frozen=True)
class Line:
    """One case: what names it, and its row by each implementation.

    value: the key that is compared.    higher: whether more of it is better.
    """

    case: tuple[str, ...]
    by: dict[str, Row]
    value: str = "median_us"
    higher: bool = False

    def measured(self, implementation: str) -> float | None:
        """The value of one implementation, if it was measured and is positive."""
        return measured(self.by.get(implementation, {}), self.value)

    def best(self, ours: bool) -> str | None:
        """The fastest implementation measured, of ours or of the others."""
        names = [n for n in self.by if is_ours(n) == ours and self.measured(n) is not None]
        pick = max if self.higher else min
        return pick(names, key=lambda n: self.measured(n) or 0.0, default=None)

    @property
    def ours(self) -> Row:
        """Our row: the fastest of ours, else one that failed, else an empty one."""
        failed = next((n for n in sorted(self.by) if is_ours(n)), "")
        return self.by.get(self.best(ours=True) or failed, {})

    @property
    def fastest(self) -> str | None:
        """The fastest implementation measured, ours or another."""
        names = [name for ours in (True, False) if (name := self.best(ours))]
        pick = max if self.higher else min
        return pick(names, key=lambda n: self.measured(n) or 0.0, default=None)

    @property
    def judged(self) -> Row:
        """The row whose speed is shown: ours if it was tried, else the fastest other one."""
        if self.best(ours=True) or missing(self.ours) != "-":
            return self.ours
        return self.by.get(self.fastest or "", {})

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the best other implementation ours is."""
        return self.over(self.best(ours=False) or "")

    def over(self, other: str) -> float | None:
        """How many times as fast as another implementation ours is, if both were measured."""
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
    """A line for each case, in the order in which they first come; of two equal rows the last.

    How fast numbers are wrong is not told.
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
    """The rows by the text of one key, in the order in which they first come."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(text(row.get(key)), []).append(row)
    return found


def rate(row: Row) -> tuple[float | None, str]:
    """A row's speed and its unit, TFLOP/s or GB/s: whichever its ceiling is a ceiling of."""
    tflops, gbps = number(row.get("tflops")), number(row.get("gbps"))
    if gbps is not None and (row.get("ceiling") == "memory" or tflops is None):
        return gbps, "GB/s"
    return tflops, "TFLOP/s"


def speed(row: Row) -> str:
    """The rate in words."""
    value, unit = rate(row)
    return "-" if value is None else f"{short(value)} {unit}"


def per_cent(value: object) -> str:
    """A number of per cent, whole from ten on."""
    x = number(value)
    return "-" if x is None else f"{x:.0f}" if x >= 9.5 else f"{x:.1f}"


def times(value: object) -> str:
    """A ratio as 1.24x."""
    x = number(value)
    return "-" if x is None else f"{x:.2f}x"


def remarks(suite: str, rows: Iterable[Row]) -> list[str]:
    """What was not measured and why, and what a measurement's note says; equal ones told once."""
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
    found = []
    for (subject, said), where in first.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        at = f" ({where[0]}{more})" if where[0] else ""
        found.append(f"{subject}{at}: {said}")
    return found
