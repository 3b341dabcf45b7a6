"""`python -m minillm profile`: measure the speed, the errors and the machine code of kernels."""

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from minillm.errors import UnavailableError
from minillm.flags import profile as flags
from minillm.profiling.catalogue.problem import CATALOGUE
from minillm.profiling.page import earlier, report
from minillm.profiling.timing import machine, suites, trace, tune
from minillm.runtime import terminal
from minillm.runtime.device import pick_device, set_threads


def main(argv: Sequence[str]) -> None:
    """Measure what the command line names: tables to standard output, progress to standard error.

    Exits with code 1 if the static audit finds a fault.
    """
    args = flags.parse(argv)
    device = _device(args.device)
    tables = [] if args.tune is None else tune.check(args.tune, device)
    names = flags.suites(args)
    folder = args.out or default_folder(device)
    if names:
        earlier.refuse_foreign(folder, names)
    if device.type == "cpu":
        set_threads(args.threads)
        say("no GPU in use: eager and compiled code is timed on the CPU; our kernels are compiled "
            "for the audit, and interpreted for their errors")  # fmt: skip
    output = Output(folder, machine.about(device, argv))
    job = suites.Job(
        device=device,
        ops=tuple(dict.fromkeys(args.op or CATALOGUE)),
        dtype=args.dtype or ("bf16" if device.type == "cuda" else "fp32"),
        quick=args.quick,
        about=output.about,
        say=say,
        save=output.save,
    )
    if args.trace:
        made = trace.write(args.trace, device, job.dtype, job.quick)
        say(f"wrote {args.trace}: {made}; open it at ui.perfetto.dev")
    faults: list[str] = []
    for name in names:
        faults += _run_suite(name, job, output, tables, args.full, only=len(names) == 1)
    for file in output.written:
        say(f"wrote {file}")
    for fault in faults:
        say(f"fault: {fault}")
    if faults:
        raise SystemExit(1)


class Output:
    """Files of results, rewritten whenever a suite has new rows.

    about: facts of the machine
    written: the files written so far, each once, in order
    """

    def __init__(self, folder: Path, about: dict) -> None:
        self.folder, self.about = folder, about
        self.written: dict[Path, None] = {}
        self._found: dict[str, list[dict]] = {}

    def save(self, name: str, rows: list[dict]) -> None:
        """Write the rows that a suite has so far, next to those of the other suites.

        name: name of the suite
        rows: all rows of the suite so far
        """
        self._found[name] = rows
        self.written.update(dict.fromkeys(report.write(self.folder, self.about, self._found)))

    def save_audit(self) -> None:
        """Write audit.md from all rows of the audit in the folder."""
        kept = earlier.read(self.folder / earlier.RESULTS)["suites"]["audit"]
        self.written[suites.write_audit(self.folder, kept)] = None


def _run_suite(
    name: str, job: suites.Job, output: Output, tables: list[str], full: bool, only: bool
) -> list[str]:
    """Run one suite, print and save its rows, and return the faults that it found.

    tables: operations whose tables of tiles are tuned, for the suite "tune"
    full: audit all builds, not only those that every commit must pass
    only: raise UnavailableError if it cannot run here, instead of going to the next suite
    """
    say(f"== {name}")
    start = time.perf_counter()
    faults: list[str] = []
    try:
        if name == "tune":
            rows = tune.run(tables, job.device, job.quick, say, partial(output.save, name))
        else:
            rows, faults = suites.measure(job, name, full)
    except UnavailableError as e:
        if only:
            raise
        say(f"no {name}: {e}")
        return []
    say(f"{name}: {time.perf_counter() - start:.0f} s")
    terminal.say(f"\n== {name}\n{report.table(name, rows)}", sys.stdout)
    output.save(name, rows)
    if name == "audit":
        output.save_audit()
    return faults


def default_folder(device: torch.device) -> Path:
    """Return benchmarks/DEVICE-DATE, below the folder that the command runs in."""
    return Path("benchmarks") / machine.folder_name(device)


def say(line: str) -> None:
    """Write one line to standard error."""
    terminal.say(line)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return pick_device(name)
