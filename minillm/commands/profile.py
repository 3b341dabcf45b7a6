"""`python -m minillm profile`: how fast, how exact and how well built the kernels are here."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from minillm import world
from minillm.cli import HelpFormatter, Parser, whole
from minillm.errors import UnavailableError, UsageError
from minillm.profiling import machine, report, sizes, suites, trace, tune

SUITES = ("kernels", "model", "decode", "audit", "roofline")


def main(argv: Sequence[str]) -> None:
    """Measure what the command line names: tables to standard output, progress to standard error.

    Ends with exit code 1 if the static audit finds a fault.
    """
    args = _parser().parse(argv)
    device = _device(args.device)
    tuned = None if args.tune is None else tune.check(args.tune, device)
    _check(args)
    if device.type == "cpu":
        world.set_threads(args.threads)
        say("no GPU in use: eager and compiled code is timed on the CPU; our kernels are compiled "
            "for the audit, and interpreted for their errors")  # fmt: skip
    job = suites.Job(
        device=device,
        ops=tuple(dict.fromkeys(args.op or sizes.OPS)),
        dtype=args.dtype or ("bf16" if device.type == "cuda" else "fp32"),
        quick=args.quick,
        about=machine.about(device, argv),
        say=say,
    )
    if args.trace:
        made = trace.write(args.trace, device, job.dtype, job.quick)
        say(f"wrote {args.trace}: {made}; open it at ui.perfetto.dev")
    names: tuple[str, ...] = ("tune",) if tuned else ()
    if args.suite or not (args.trace or tuned):
        names += SUITES if args.suite == "all" else (args.suite or "kernels",)
    found: dict[str, list[dict]] = {}
    faults: list[str] = []
    for name in names:
        try:
            if name == "tune":
                found[name] = tune.run(tuned, device, job.quick, say)
            else:
                found[name], faults = suites.measure(job, name, args.full)
        except UnavailableError as e:
            if len(names) == 1:
                raise
            say(f"no {name}: {e}")
            continue
        print(f"\n== {name}\n{report.table(name, found[name])}", flush=True)
        # After each suite, so that what ends the next does not take this one along.
        folder = args.out or default_folder(device)
        written = report.write(folder, job.about, found)
        if name == "audit":
            written.append(suites.write_audit(folder, found[name]))
    for path in written if found else ():
        say(f"wrote {path}")
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
    if name == "auto":  # mps has no kernels to compare with
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return world.pick_device(name)


def _check(args: Namespace) -> None:
    """Raise UsageError on what the flags cannot mean, before anything is measured."""
    for op in args.op or ():
        if op not in sizes.OPS:
            raise UsageError(f"--op {op}: not one of {', '.join(sizes.OPS)}")
    if args.full and args.suite not in ("audit", "all"):
        raise UsageError("--full is of the audit; add --suite audit or all")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is not a folder")


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
        type=Path,
        metavar="DIR",
        help="folder for results.json, a CSV a suite and index.html; suites that it has of earlier "
        "runs stay (without it: benchmarks/DEVICE-DATE)",
    )
    add("--trace", type=Path, metavar="FILE", help="write a Perfetto trace of training steps")
    add(
        "--tune",
        nargs="*",
        metavar="OP",
        help="on a GPU: measure tiles around those in kernels/tiles, of all operations or these, "
        "and rewrite this architecture's tables",
    )
    add("--quick", action="store_true", help="seconds, not minutes: small, few runs, not compiled")
    return parser
