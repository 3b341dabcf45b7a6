"""Format a plan as lines and tables of at most 80 columns."""

import textwrap
from collections.abc import Mapping, Sequence

from minillm.runtime.units import count, si, size, span

WIDTH = 80
GIB = 2**30
NAMES = {
    "activations": "activations, estimated",
    "average": "average (--ema)",
    "host": "in the host's memory",
    "communication_s": "communication",
    "exposed_s": "  of it not hidden",
    "optimizer_s": "optimizer",
    "total_s": "step",
    "tokens_per_s": "tokens per second",
    "run_s": "whole run",
}


def shown(found: dict, hardware: str) -> str:
    """Return the plan as text.

    found: plan, as `minillm plan --json` prints it
    hardware: description of the machine
    """
    lines = [
        *_field("verdict", _verdict(found["verdict"], found)),
        *_field("micro-batch", _micro(found["verdict"], found)),
        *_field("time", _time(found)),
        *_field("hardware", hardware),
        *_field("model", _model(found["model"], found["parameters"]["total"])),
        "",
        _parameters(found["parameters"]),
        "",
        *_field("compute", _compute(found["flops"])),
        "",
        _memory(found),
        "",
        _times(found),
        "",
    ]
    for figure in found["figures"]:
        lines += textwrap.wrap(
            figure, WIDTH, initial_indent="- ", subsequent_indent="  ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)


def _field(name: str, words: str) -> list[str]:
    """Return a name and its text, folded to the right of it."""
    return textwrap.wrap(
        words, WIDTH, initial_indent=f"{name:<12}", subsequent_indent=" " * 12,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:,.1f}" if n_bytes >= GIB / 10 else f"{n_bytes / GIB:.2g}"


def _verdict(v: Mapping, found: dict) -> str:
    """Return whether the job fits, by how much, and what would help if it does not."""
    each = "per GPU" if found["gpu"]["kind"] == "GPU" else "per rank"
    if v["needed_bytes"] is None:
        return "unknown: the activations of so deep a core are not counted"
    if v["capacity_bytes"] is None:
        return f"unknown: needs {size(v['needed_bytes'])} {each}, of an unknown memory"
    need, total = _gib(v["needed_bytes"]), _gib(v["capacity_bytes"])
    if v["fits"]:
        return f"fits: {need} of {total} GiB {each} at --zero {found['zero']}"
    ways = ", or ".join(v["advice"])
    return (
        f"does not fit: needs {need} of {total} GiB {each}, of which "
        f"{_gib(v['usable_bytes'])} are usable; take {ways}"
    )


def _micro(v: Mapping, found: dict) -> str:
    """Return the micro-batch, and the largest that fits."""
    share = v["micro_batch"] * found["micro_batches"]
    now = f"{v['micro_batch']} of the {share:,} sequences that a rank has in a step"
    largest, most = v["largest_micro_batch"], v["most_sequences"]
    if largest is None:
        return f"{now}; the largest that fits is unknown"
    if largest == 0:
        return f"{now}; not even 1 fits"
    if largest == v["micro_batch"]:
        more = f"; memory would hold {most:,} at a time" if most > share else ""
        return f"{now}: the largest that fits{more}"
    return f"{now}; the largest that fits is {largest}"


def _time(found: dict) -> str:
    """Return how long the run takes, and that this is an estimate."""
    f, time = found["flops"], found["time"][str(found["zero"])]
    kind = "estimated from a peak measured here" if found["gpu"]["measured"] else (
        "estimated from data sheets, not measured"
    )  # fmt: skip
    least = "at least " * found["launches_count"]
    if f["steps"] is None:
        return (
            f"{least}{span(time['total_s'])} per step, {kind}; the length of the run is unknown: "
            "give --steps, or prepared text as --data"
        )
    limit, steps = f["time_limit_s"], f["steps"]
    if limit is None or time["run_s"] <= limit:
        tokens = count(steps * f["step_tokens"])
        return f"{least}{span(time['run_s'])} for {steps:,} steps and {tokens} tokens, {kind}"
    done = int(limit / time["total_s"])
    tokens = count(done * f["step_tokens"])
    return (
        f"{span(limit)}, as --time-limit ends it after about {done:,} of {steps:,} steps and "
        f"{tokens} tokens, {kind}"
    )


def _model(m: Mapping, total: int) -> str:
    """Return the shape in words, a core with how often it runs."""
    layers = " + ".join(map(str, m["depths"]))
    if m["mean_recurrence"]:
        prelude, core, coda = m["depths"]
        layers = f"{prelude} + {core} x {m['mean_recurrence']} + {coda}"
    preset = f"preset {m['preset']}, " if m["preset"] else ""
    return (
        f"{preset}{count(total)} parameters, {layers} layers of {m['d_model']}, context "
        f"{m['seq_len']:,}; {m['batch_size']:,} sequences in a step"
    )


def _compute(f: Mapping) -> str:
    run = "" if f["run"] is None else f", {si(f['run'], 'FLOP')} in {f['steps']:,} steps"
    return f"{si(f['token'], 'FLOP')} per token, {si(f['step'], 'FLOP')} per step{run}"


def _parameters(p: Mapping) -> str:
    """Return the table of parameters; a pass uses others than are stored if a core is repeated."""
    parts = p["parts"]
    rows = [("parameters", "stored", "used in a pass")]
    rows += [(n, count(v["stored"]), count(v["used"])) for n, v in parts.items()]
    rows.append(("total", count(p["total"]), count(sum(v["used"] for v in parts.values()))))
    words = f"in all {p['total']:,} parameters; vocabulary {p['vocabulary']}"
    return "\n".join([_aligned(rows), *textwrap.wrap(words, WIDTH, break_on_hyphens=False)])


def _stages(found: dict) -> list[str]:
    """Return the ZeRO stages worth a column: those the job can have, and one for a single rank."""
    own = str(found["zero"])
    return [
        s for s, m in found["memory"].items() if m is not None and (found["ranks"] > 1 or s == own)
    ]


def _memory(found: dict) -> str:
    """Return the table of memory by ZeRO stage, in GiB or, of small models, in MiB."""
    stages = {s: found["memory"][s] for s in _stages(found)}
    usable = found["verdict"]["usable_bytes"]
    sums = {s: _sum(m) for s, m in stages.items()}
    power, unit = (30, "GiB") if max(n or 0 for n in sums.values()) >= GIB else (20, "MiB")

    def cell(n: float | None) -> str:
        if n is None:
            return "not counted"
        return "<0.01" if 0 < n < 0.005 * 2**power else f"{n / 2**power:,.2f}"

    rows = [(f"{unit} per rank", *_heads(found))]
    for kind in stages[str(found["zero"])]:
        if kind != "host" and any(m[kind] != 0 for m in stages.values()):
            rows.append((NAMES.get(kind, kind), *(cell(m[kind]) for m in stages.values())))
    rows.append(("total", *(cell(n) for n in sums.values())))
    if usable is not None and None not in sums.values():
        rows.append(("fits", *("yes" if n <= usable else "no" for n in sums.values())))
    if any(m["host"] for m in stages.values()):
        rows.append((NAMES["host"], *(cell(m["host"]) for m in stages.values())))
    return _aligned(rows)


def _sum(memory: Mapping) -> float | None:
    """Return what a rank holds, without the host's memory; None where a part is unknown."""
    if None in memory.values():
        return None
    return sum(n for kind, n in memory.items() if kind != "host")


def _times(found: dict) -> str:
    """Return the table of times by ZeRO stage."""
    times = {s: found["time"][s] for s in _stages(found)}
    rows = [("estimated time", *_heads(found))]
    for key in times[str(found["zero"])]:
        cells = [_cell(t[key], key, found["flops"]["time_limit_s"]) for t in times.values()]
        if set(cells) - {"", "0 s"}:  # one rank sends nothing; a run of unknown length has no end
            rows.append((NAMES.get(key, key.removesuffix("_s")), *cells))
    return _aligned(rows)


def _cell(value: float | None, key: str, limit: float | None) -> str:
    if value is None:
        return ""
    if key == "run_s" and limit is not None:
        value = min(value, limit)
    return count(value) if key == "tokens_per_s" else span(value)


def _heads(found: dict) -> list[str]:
    return [f"zero {s}" + " *" * (s == str(found["zero"])) for s in _stages(found)]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<" + ">" * (len(widths) - 1)
    return "\n".join(
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    )
