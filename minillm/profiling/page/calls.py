"""List the calls of `minillm profile` whose results are in one folder, with their suites."""

from collections.abc import Mapping, Sequence
from html import escape

from minillm.profiling.page.pivot import Row, short, size, text

MACHINE = (
    "device",
    "driver",
    "torch",
    "triton",
    "python",
    "commit",
)  # same facts: same run

Suites = Mapping[str, Sequence[Row]]


def of_row(suite: str, op: str, about: dict, earlier: Mapping[str, dict]) -> dict:
    """Return the facts about the call that measured an operation's rows.

    suite: name of the suite
    op: name of the operation
    about: facts about the last call
    earlier: facts about earlier calls, by "SUITE" or "SUITE OP"
    """
    return earlier.get(f"{suite} {op}", earlier.get(suite, about))


def measured(about: dict, suites: Suites, earlier: Mapping[str, dict]) -> list[tuple[dict, str]]:
    """Return each call, the last one first, with the suites and operations it measured.

    about: facts about the last call
    suites: rows by suite
    earlier: facts about earlier calls, by "SUITE" or "SUITE OP"
    """
    calls: list[tuple[dict, dict[str, list[str]]]] = [(about, {})]
    for suite, rows in suites.items():
        for op in dict.fromkeys(text(row.get("op")) for row in rows):
            said = of_row(suite, op, about, earlier)
            known = next((names for call, names in calls if call == said), None)
            if known is None:
                known = {}
                calls.append((said, known))
            known.setdefault(suite, []).append(op)
    whole = {s: len({text(row.get("op")) for row in rows}) for s, rows in suites.items()}
    found = []
    for call, names in calls:
        words = [
            s if len(ops) == whole[s] else f"{s}: {', '.join(ops)}" for s, ops in names.items()
        ]
        if words or call is about:
            found.append((call, "; ".join(words)))
    return found


def ceilings_in_words(roofs: object) -> str:
    """Return ceilings as "fp32 0.024 TFLOP/s, memory 8.06 GB/s, data of 1.00 MiB 45.2 GB/s"."""
    if not isinstance(roofs, Mapping):
        return text(roofs)
    found = []
    for name, value in roofs.items():
        if isinstance(value, Mapping):
            sizes = ((size(int(n)) if n.isdecimal() else n, gbps) for n, gbps in value.items())
            found += [f"data of {n} {short(gbps)} GB/s" for n, gbps in sizes]
        elif name.endswith("_tflops"):
            found.append(f"{name.removesuffix('_tflops')} {short(value)} TFLOP/s")
        elif name.endswith("_gbps"):
            found.append(f"{name.removesuffix('_gbps')} {short(value)} GB/s")
        else:
            found.append(f"{name} {text(value)}")
    return ", ".join(found)


def section(about: dict, suites: Suites, earlier: Mapping[str, dict]) -> str:
    """Return the facts about the machine, and about each call that the results come from.

    The common facts come first. Facts that are not known are left out.

    about: facts about the last call
    suites: rows by suite
    earlier: facts about earlier calls, by "SUITE" or "SUITE OP"
    """
    calls = measured(about, suites, earlier)
    first = [*MACHINE, "date", "command", "ceilings"]
    keys = first + [key for key in about if key not in first]
    if len(calls) == 1:
        return _facts({key: about.get(key) for key in keys})
    same = [key for key in keys if all(call.get(key) == about.get(key) for call, _ in calls)]
    parts = [_facts({key: about.get(key) for key in same}), "<h3>Calls</h3>"]
    for call, names in calls:
        own = {key: value for key, value in call.items() if key not in same}
        parts.append(_facts({"measured": names, "command": call.get("command"), **own}))
    return "\n".join(parts)


def _facts(facts: Mapping[str, object]) -> str:
    """Return a list of names and values, without those that are not known."""
    pairs = []
    for key, value in facts.items():
        words = ceilings_in_words(value) if isinstance(value, Mapping) else text(value)
        if words:
            pairs.append(f"<dt>{escape(str(key))}</dt><dd>{escape(words)}</dd>")
    return f"<dl>{''.join(pairs)}</dl>"
