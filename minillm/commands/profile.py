"""`python -m minillm profile`: how fast, how exact and how well built the kernels are here."""

import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from minillm import world
from minillm.cli import HelpFormatter, Parser, path, whole
from minillm.errors import UnavailableError, UsageError
from minillm.profiling import machine, report, sizes, suites, trace, tune
from minillm.storage import check_place

SUITES = ("kernels", "model", "decode", "audit", "roofline")
BY_OP = ("kernels", "audit", "roofline")


def main(argv: Sequence[str]) -> None:
    """Measure what the command line names: tables to standard output, progress to standard error.

    Ends with exit code 1 if the static audit finds a fault.
    """
    args = _parser().parse(argv)
    device = _device(args.device)
    tuned = None if args.tune is None else tune.check(args.tune, device)
    names = _names(args)
    _check(args, names)
    if device.type == "cpu":
        world.set_threads(args.threads)
        say("no GPU in use: eager and compiled code is timed on the CPU; our kernels are compiled "
            "for the audit, and interpreted for their errors")  # fmt: skip
    folder = args.out or default_folder(device)
    found: dict[str, list[dict]] = {}
    written: dict[Path, None] = {}  # in their order, each once

    def save(name: str, rows: list[dict]) -> None:
        found[name] = rows
        with warnings.catch_warnings(record=True) as told:
            written.update(dict.fromkeys(report.write(folder, job.about, found)))
        for warning in told:
            say(f"warning: {warning.message}")

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
        print(f"\n== {name}\n{report.table(name, rows)}", flush=True)
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
    print(line, file=sys.stderr, flush=True)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] == "mps":
        raise UsageError(f"--device {name}: no kernels to compare there; use --device cpu")
    return world.pick_device(name)


def _names(args: Namespace) -> tuple[str, ...]:
    """The suites to run, in order; `kernels` if nothing at all is asked for."""
    names = () if args.tune is None else ("tune",)
    if args.suite or not (args.trace or names):
        names += SUITES if args.suite == "all" else (args.suite or "kernels",)
    return names


def _check(args: Namespace, names: tuple[str, ...]) -> None:
    """Raise UsageError on what the flags cannot mean, before anything is measured."""
    for op in args.op or ():
        if op not in sizes.OPS:
            raise UsageError(f"--op {op}: not one of {', '.join(sizes.OPS)}")
    if args.op and not set(names) & set(BY_OP):
        raise UsageError(f"--op is of {', '.join(BY_OP)}; leave it out, or add --suite kernels")
    if args.full and args.suite not in ("audit", "all"):
        raise UsageError("--full is of the audit; add --suite audit or all")
    if args.dtype and set(names) <= {"audit", "tune"}:
        raise UsageError("--dtype is not of the audit, nor of --tune: they take each that ships")
    if names:
        check_place("--out", args.out or Path("benchmarks"))
    if args.trace:
        if args.trace.is_dir():
            raise UsageError(f"--trace {args.trace} is a folder; name a file")
        check_place("--trace", args.trace.parent)


def _parser() -> Parser:
    parser = Parser(
        prog="minillm profile",
        description="Measure this machine: each operation by PyTorch eagerly, compiled, by the "
        "vendor's kernels and by ours in Triton, and the model on top of them.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add(
        "--suite",
        choices=(*SUITES, "all"),
        help="kernels: each operation; model: a training step; decode: tokens a second; audit: "
        "machine code, compiled without a GPU; roofline: against what this machine can do (without "
        "--suite, --tune and --trace: kernels)",
    )
    add("--full", action="store_true", help="audit every kernel, size, dtype and feature, not some")
    add(
        "--op",
        action="append",
        metavar="NAME",
        help="of kernels, roofline and audit only this operation; may be repeated",
    )
    add(
        "--dtype",
        choices=tuple(machine.DTYPES),
        help="of the data (without it: bf16 on a GPU, fp32 on a CPU)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--threads",
        default="auto",
        type=lambda text: text if text == "auto" else whole(1, 4096)(text),
        help="of a CPU; auto times a matrix product",
    )
    add(
        "--out",
        type=path,
        metavar="DIR",
        help="folder for results.json, a CSV a suite and index.html; suites and operations that it "
        "has of earlier runs stay (without it: benchmarks/DEVICE-DATE)",
    )
    add("--trace", type=path, metavar="FILE", help="write a Perfetto trace of training steps")
    add(
        "--tune",
        nargs="*",
        metavar="OP",
        help="on a GPU: measure tiles around those in kernels/tiles, of all operations or these, "
        "and rewrite this architecture's tables",
    )
    add("--quick", action="store_true", help="seconds, not minutes: small, few runs, not compiled")
    return parser
