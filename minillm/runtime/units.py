"""Format numbers for people: 124 M, 642 MFLOP, 2 h 14 min, 41.2 GiB."""

from collections.abc import Sequence

MINUTE, HOUR, DAY, YEAR = 60, 3600, 86400, 365.25 * 86400


def digits(value: float) -> str:
    """Return `value` in three significant digits, without an exponent from 0.001 to 1e15."""
    if value == 0:
        return "0"
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    if abs(value) >= 0.001:
        return f"{value:.3g}"
    return f"{value:.2g}"


def _scaled(value: float, suffixes: Sequence[str], base: float = 1000.0) -> tuple[str, str]:
    """Return the digits of `value` divided by a power of `base`, and the suffix of that power."""
    suffix = ""
    for step in suffixes:
        if abs(value) < base * 0.9995:
            break
        value, suffix = value / base, step
    return digits(value), suffix


def things(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1: 1 document, 1,200 documents.

    number: the number
    noun: the noun in the singular
    """
    return f"{number:,} {noun}" + "s" * (number != 1)


def count(value: float) -> str:
    """Return a count: 950, 837 K, 124 M, 10.5 B, 1.2 T."""
    text, suffix = _scaled(value, "KMBT")
    return f"{text} {suffix}".rstrip()


def si(value: float, unit: str) -> str:
    """Return a value with a unit and a decimal prefix: 642 MFLOP, 3.35 TB/s.

    value: the value in the unit
    unit: the unit without a prefix
    """
    text, prefix = _scaled(value, "kMGTPEZY")
    return f"{text} {prefix}{unit}"


def size(n_bytes: float) -> str:
    """Return bytes with a binary prefix: 512 B, 5.4 MiB, 41.2 GiB."""
    text, prefix = _scaled(n_bytes, ("Ki", "Mi", "Gi", "Ti"), 1024.0)
    return f"{text} {prefix}B"


def span(seconds: float) -> str:
    """Return a duration: 5.3 us, 12.4 s, 5 min 12 s, 2 h 14 min, 3.2 days, 5.1 years."""
    if seconds < 59.95:
        for factor, unit in ((1, "s"), (1e3, "ms")):
            if seconds * factor >= 0.9995:
                return f"{digits(seconds * factor)} {unit}"
        return f"{digits(seconds * 1e6)} us" if seconds else "0 s"
    if seconds < HOUR - 0.5:
        minutes, rest = divmod(round(seconds), MINUTE)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    if seconds < 2 * DAY:
        hours, minutes = divmod(round(seconds / MINUTE), 60)
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{digits(seconds / DAY)} days" if seconds < 2 * YEAR else (
        f"{digits(seconds / YEAR)} years"
    )  # fmt: skip


def limits(low: float, high: float | None) -> str:
    """Return the allowed values in words; whole limits keep all of their digits.

    low: smallest allowed value
    high: largest allowed value, or None for no limit
    """
    words = [f"{x:.0f}" if x == int(x) else f"{x:g}" for x in (low, high) if x is not None]
    return f"at least {words[0]}" if high is None else f"between {words[0]} and {words[1]}"
