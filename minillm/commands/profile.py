"""`python -m minillm profile`: how fast, how exact and how well built the kernels are here."""

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from minillm.errors import UnavailableError
from minillm.flags import profile as flags
from minillm.profiling.page import report
from minillm.profiling.timing import machine, sizes, suites, trace, tune
from minillm.runtime import device as world, terminal


def main(argv: Sequence[str]) -> None:
    """Measure what the command line names: tables to standard output, progress to standard error.

    Ends with exit code 1 if the static audit finds a fault.
    """
    args = flags.parse(argv)
    device = _device(args.device)
    tuned = None if args.tune is None else tune.check(args.tune, device)
    names = flags.suites(args)
    folder = args.out or default_folder(device)
    if names:
        report.refuse_foreign(folder, names)
    if device.type == "cpu":
        world.set_threads(args.threads)
        say("no GPU in use: eager and compiled code is timed on the CPU; our kernels are compiled "
            "for the audit, and interpreted for their errors")  # fmt: skip
    found: dict[str, list[dict]] = {}
    written: dict[Path, None] = {}  # in their order, each once

    def save(name: str, rows: list[dict]) -> None:
        found[name] = rows
        written.update(dict.fromkeys(report.write(folder, job.about, found)))

    job = suites.Job(
        device=device,
        ops=tuple(dict.fromkeys(args.op or sizes.OPS)),
        dtype=args.dtype or ("bf16" if device.type == "cuda" else "fp32"),
        quick=args.quick,
        about=machine.about(device, argv),
        say=say,
        save=save,
    )
    if args.trace:
        made = trace.write(args.trace, device, job.dtype, job.quick)
        say(f"wrote {args.trace}: {made}; open it at ui.perfetto.dev")
    faults: list[str] = []
    for name in names:
        say(f"== {name}")
        start = time.perf_counter()
        try:
            if name == "tune":
                rows = tune.run(tuned, device, job.quick, say, partial(save, name))
            else:
                rows, wrong = suites.measure(job, name, args.full)
                faults += wrong
        except UnavailableError as e:
            if len(names) == 1:
                raise
            say(f"no {name}: {e}")
            continue
        say(f"{name}: {time.perf_counter() - start:.0f} s")
        terminal.say(f"\n== {name}\n{report.table(name, rows)}", sys.stdout)
        save(name, rows)
        if name == "audit":
            kept = report.read(folder / report.RESULTS)["suites"][name]
            written[suites.write_audit(folder, kept)] = None
    for file in written:
        say(f"wrote {file}")
    for fault in faults:
        say(f"fault: {fault}")
    if faults:
        raise SystemExit(1)


def default_folder(device: torch.device) -> Path:
    """benchmarks/DEVICE-DATE, below the folder that the command runs in."""
    return Path("benchmarks") / machine.folder_name(device)


def say(line: str) -> None:
    """One line on standard error."""
    terminal.say(line)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return world.pick_device(name)
