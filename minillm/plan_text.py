"""A plan as text: what commands/plan.py found, in tables for a terminal."""

from collections.abc import Sequence

from minillm.announce import duration

NAMES = {
    "activations": "activations (estimate)",
    "host": "in the host's memory",
    "exposed_s": "of it not hidden",
    "tokens_per_s": "tokens/s",
    "run_s": "the whole run",
}


def shown(found: dict) -> str:
    """The plan as text."""
    stage, p, f = str(found["zero"]), found["parameters"], found["flops"]
    used = {name: part["used"] for name, part in p["parts"].items()}
    rows = [("parameters", "stored", "used a pass")]
    rows += [(n, f"{v['stored']:,}", f"{v['used']:,}") for n, v in p["parts"].items()]
    rows += [("total", f"{p['total']:,}", f"{sum(used.values()):,}")]
    lines = [_aligned(rows), f"vocabulary  {p['vocabulary']}", ""]
    lines.append(f"FLOPs       {f['token']:.4g} a token, {f['step']:.4g} a step")
    end = "" if f["time_limit_s"] is None else f", or {duration(f['time_limit_s'])} if that is less"
    if f["run"] is None:
        lines.append(
            "            a run of unknown length: give --steps, or prepared text as --data"
        )
    else:
        lines.append(f"            {f['run']:.4g} in {f['steps']:,} steps{end}")
    memory = found["memory"]
    kinds = [k for k in memory[stage] if any(m and m[k] for m in memory.values())]
    rows = [(f"MiB a rank of {found['ranks']}", *_heads(found))]
    for kind in [*kinds, "total"]:
        rows.append((NAMES.get(kind, kind), *(_mib(m, kind) for m in memory.values())))
    lines += ["", _aligned(rows), ""]
    head = "extrapolation, s a step" if found["extrapolation"] else "predicted, s a step"
    rows = [(head, *_heads(found))]
    for key in found["time"][stage]:
        cells = (_cell(t, key) for t in found["time"].values())
        rows.append((NAMES.get(key, key.removesuffix("_s")), *cells))
    lines += [_aligned(rows), "", *(f"- {line}" for line in found["figures"])]
    return "\n".join(lines)


def _heads(found: dict) -> list[str]:
    return [f"zero {s}" + " *" * (s == str(found["zero"])) for s in found["memory"]]


def _mib(memory: dict | None, kind: str) -> str:
    if memory is None or memory.get(kind, 0) is None:
        return "-"
    total = sum(v or 0 for k, v in memory.items() if k != "host")
    return f"{(total if kind == 'total' else memory[kind]) / 2**20:,.1f}"


def _cell(time: dict | None, key: str) -> str:
    if time is None or time[key] is None:
        return "-"
    if key == "run_s":
        return duration(time[key])
    return f"{time[key]:,.0f}" if key == "tokens_per_s" else f"{time[key]:.4g}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<" + ">" * (len(widths) - 1)
    return "\n".join(
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    )
