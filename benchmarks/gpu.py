"""Check and measure this checkout on a machine with an NVIDIA GPU, with one command.

    python benchmarks/gpu.py                           # the set `first`: 470 s at most
    python benchmarks/gpu.py --parts second            # the set `second`: 250 s at most
    python benchmarks/gpu.py --parts correctness,attention --total 300 --out DIR
    python benchmarks/gpu.py --dry --parts all         # every part on a CPU, at tiny sizes

Each part is a process with its own time limit (device_parts/). A part that hangs or crashes costs
its own time only, and the rows that it has written are kept.

The folder of results is written again after each part. A second command with the same folder adds
its parts to those that are there.
    results.json    all parts with their rows
    report.txt      what is wrong, then a table for each part
    rows.jsonl      every row of every command, one line each, written as soon as it is measured
    log.txt         everything that the parts print

The exit code is 1 if a result is wrong or was not checked, a part crashed, or the part
`correctness` did not finish.
"""

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DRY_LIMIT_S = 300  # limit of each part of a dry run; interpreted kernels are slow
LEAST_S = 8  # a part is not started with less time left
TAIL_LINES = 25  # lines of the log that are kept of a part that did not finish
ROWS, LOG = "rows.jsonl", "log.txt"


@dataclass(frozen=True)
class Part:
    """One part: a module of device_parts/, its time limit in seconds, and what it measures."""

    name: str
    limit: float
    about: str


# In the order in which they run, the most informative first.
PARTS = (
    Part("environment", 35, "versions, ceilings of the GPU, cost of a launch"),
    Part("correctness", 110, "every operation, forward and backward, against fp64"),
    Part("attention", 80, "attention, head width 64 and 128, 1k to 16k tokens; flash, cuDNN"),
    Part("step", 45, "a training step of 162M parameters: Triton, eager"),
    Part("decode", 45, "tokens a second: Triton, eager"),
    Part("operations", 60, "the other operations, against eager and the vendor's kernels"),
    Part("sweep", 70, "attention with tiles around those of the table"),
    Part("main", 80, "train.py and sample.py as a user types them"),
    Part("tests", 110, "pytest -m gpu tests/kernels"),
    Part("compile", 110, "a training step of 162M parameters in torch.compile"),
)
SETS = {  # names of parts, and the seconds that they share
    "first": ("environment correctness attention step decode operations sweep main", 470),
    "second": ("environment tests compile", 250),
    "all": (" ".join(part.name for part in PARTS), 720),
}

Result = dict  # keys: state, seconds, date, rows, tail
Command = Callable[[Part, float, Path, Namespace], list[str]]


def main(
    argv: Sequence[str] | None = None,
    known: Sequence[Part] = PARTS,
    command: Command | None = None,
) -> int:
    """Run the parts that the flags name, and return the exit code.

    argv: the command line (None: that of this process)
    known: the parts that there are
    command: command(part, limit, scratch, args) returns the words that start a part (None: the
        process of device_parts/)
    """
    args = parse(argv, [part.name for part in known])
    args.out.mkdir(parents=True, exist_ok=True)
    results = earlier_results(args.out)
    end = time.monotonic() + args.total
    for part in (part for part in known if part.name in args.parts):
        left = end - time.monotonic() - 2  # the last two seconds are for the report
        limit = min(DRY_LIMIT_S if args.dry else part.limit, left)
        print(f"{part.name}: {part.about} (at most {max(limit, 0):.0f} s)", flush=True)
        if left < LEAST_S:
            results[part.name] = _result("not started: no time left")
        else:
            results[part.name] = run_part(part, limit, args, command or _part_command)
        found = results[part.name]
        print(f"  {found['state']}, {found['seconds']:.0f} s, {len(found['rows'])} rows")
        write(args.out, results)
    print(f"\n{report(results)}\nResults: {args.out}", flush=True)
    return 1 if faults(results) else 0


def parse(argv: Sequence[str] | None, names: Sequence[str]) -> Namespace:
    """Return the checked flags: parts is a list of names, total a number, out a path.

    argv: the command line (None: that of this process)
    names: names of the known parts
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="first", help="first, second, all, or names with commas")
    parser.add_argument("--total", type=float, help="seconds for all parts (that of the set)")
    parser.add_argument("--out", type=Path, help="folder of results (benchmarks/DEVICE-DATE)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, interpreted")
    args = parser.parse_args(argv)
    words, seconds = SETS.get(args.parts, (args.parts.replace(",", " "), SETS["all"][1]))
    args.parts = words.split()
    unknown = [name for name in args.parts if name not in names]
    if unknown:
        parser.error(f"--parts {unknown[0]}: expected {', '.join((*SETS, *names))}")
    if args.total is None:
        args.total = DRY_LIMIT_S * len(args.parts) if args.dry else seconds
    args.out = args.out or default_folder(args.dry)
    if args.out is None:
        parser.error("nvidia-smi names no GPU here; add --dry, or name a folder with --out")
    args.out = args.out.resolve()
    return args


def default_folder(dry: bool) -> Path | None:
    """Return benchmarks/DEVICE-DATE, such as benchmarks/nvidia-h200-2026-11-28; None without a GPU.

    A dry run measures nothing, so its results go to a new temporary folder.
    """
    if dry:
        return Path(tempfile.mkdtemp(prefix="minillm-dry-"))
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(words, capture_output=True, timeout=20).stdout.decode()
    except (OSError, subprocess.TimeoutExpired):
        names = ""
    device = (names.splitlines() or [""])[0]
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return ROOT / "benchmarks" / f"{slug}-{datetime.date.today().isoformat()}" if slug else None


def _part_command(part: Part, limit: float, scratch: Path, args: Namespace) -> list[str]:
    """Return the words that start a part of device_parts/, with a limit in seconds."""
    words = [sys.executable, "-m", "benchmarks.device_parts", part.name]
    words += ["--rows", str(args.out / ROWS), "--limit", f"{limit:.0f}", "--scratch", str(scratch)]
    return words + ["--dry"] * args.dry


def run_part(part: Part, limit: float, args: Namespace, command: Command) -> Result:
    """Run a part in a separate session, and return its rows even if it crashed or was stopped.

    part, limit: the part, and its time limit in seconds
    args, command: the flags, and the command, see `main`
    """
    rows, log = args.out / ROWS, args.out / LOG
    for path in (rows, log):
        path.touch()
    rows_start, log_start, start = rows.stat().st_size, log.stat().st_size, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="minillm-gpu-", ignore_cleanup_errors=True) as scratch:
        with log.open("ab") as output:
            process = subprocess.Popen(
                command(part, limit, Path(scratch), args), cwd=ROOT, env=environment(args.dry),
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            code = process.wait(limit)
            state = "done" if code == 0 else f"crashed with exit code {code}"
        except subprocess.TimeoutExpired:
            state = f"stopped at its limit of {limit:.0f} s"
        finally:
            stop(process)
    lines = _text_after(log, log_start).splitlines()
    tail = [] if state == "done" else lines[-TAIL_LINES:]
    return _result(state, time.monotonic() - start, _rows_after(rows, rows_start), tail)


def _result(
    state: str, seconds: float = 0.0, rows: Sequence[dict] = (), tail: Sequence[str] = ()
) -> Result:
    """Return a part's entry in results.json; tail: the end of its log if it did not finish."""
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {
        "state": state, "seconds": round(seconds, 1), "date": date, "rows": list(rows),
        "tail": list(tail),
    }  # fmt: skip


def environment(dry: bool) -> dict[str, str]:
    """Return the environment of a part. A dry run has no GPU, and interprets Triton's kernels."""
    dry_words = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, "PYTHONUNBUFFERED": "1", **(dry_words if dry else {})}


def stop(process: subprocess.Popen) -> None:
    """Kill a part with every process that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _text_after(path: Path, start: int) -> str:
    """Return the text of a file from byte `start` on."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def _rows_after(path: Path, start: int) -> list[dict]:
    """Return the rows of a file from byte `start` on, without a last line that was cut short."""
    found = []
    for line in _text_after(path, start).splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            row.pop("part", None)  # results.json has the rows under this name
            found.append(row)
    return found


def earlier_results(out: Path) -> dict[str, Result]:
    """Return the parts of an earlier command with the same folder."""
    try:
        return json.loads((out / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def write(out: Path, results: dict[str, Result]) -> None:
    """Write results.json and report.txt.

    out, results: folder of the results, and the results of all parts by name
    """
    (out / "results.json").write_bytes(f"{json.dumps(results, indent=1)}\n".encode())
    (out / "report.txt").write_bytes(report(results).encode())


def faults(results: dict[str, Result]) -> list[str]:
    """Return a line for each fault: rows with a verdict other than "right", then parts.

    A verdict is "right", "WRONG" with a reason, or "not checked". WRONG comes first.
    """
    found = []
    for name, part in results.items():
        for row in part["rows"]:
            if row.get("verdict", "right") != "right":
                found.append(f"{name}: " + "  ".join(f"{k}={cell(v)}" for k, v in row.items()))
    found.sort(key=lambda line: ": verdict=WRONG" not in line)
    for name, part in results.items():
        unchecked = name == "correctness" and part["state"] != "done"
        if unchecked or part["state"].startswith("crashed"):
            found.append(f"{name}: {part['state']}")
    return found


def report(results: dict[str, Result]) -> str:
    """Return the report: faults, then each part's tables, and the last lines of its output."""
    bad = faults(results)
    lines = ["FAULTS", *bad] if bad else ["No faults."]
    for name, part in results.items():
        lines += ["", f"== {name}: {part['state']}, {part['seconds']:.0f} s, {part['date']}"]
        lines += table(part["rows"])
        if part["tail"]:
            lines += ["-- its last lines:", *part["tail"]]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[dict]) -> list[str]:
    """Return the lines of tables, one for each group of neighbouring rows with the same keys."""
    lines: list[str] = []
    for keys, group in groupby(rows, key=tuple):
        cells = [list(keys), *([cell(row[key]) for key in keys] for row in group)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for texts in cells:
            padded = (text.ljust(n) for text, n in zip(texts, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
    return lines


def cell(value: object) -> str:
    """Return a value in a few characters, on one line."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else " ".join(str(value).split())[:160]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running part is stopped
    sys.exit(main())
