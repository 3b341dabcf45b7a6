"""The command line of `minillm profile`."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from minillm.cli import HelpFormatter, Parser, path, whole
from minillm.errors import UsageError
from minillm.storage import check_place

SUITES = ("kernels", "model", "decode", "audit", "roofline")
BY_OP = ("kernels", "audit", "roofline")
OPERATIONS = (
    *("attention", "decode_attention", "rms_norm", "add_rms_norm", "sandwich_norm", "rope"),
    *("swiglu", "adamw", "linear_cross_entropy", "newton_schulz", "sample"),
)
DTYPES = ("fp32", "fp16", "bf16")


def parse(argv: Sequence[str]) -> Namespace:
    """Parse the flags of `minillm profile`; raise UsageError on flags that do not fit together."""
    args = parser().parse(argv)
    if args.device.partition(":")[0] == "mps":
        raise UsageError(f"--device {args.device}: no kernels to compare there; use --device cpu")
    _check(args, suites(args))
    return args


def suites(args: Namespace) -> tuple[str, ...]:
    """Return the suites to run, in order; `kernels` if nothing at all is asked for."""
    names = () if args.tune is None else ("tune",)
    if args.suite or not (args.trace or names):
        names += SUITES if args.suite == "all" else (args.suite or "kernels",)
    return names


def _check(args: Namespace, names: tuple[str, ...]) -> None:
    for op in args.op or ():
        if op not in OPERATIONS:
            raise UsageError(f"--op {op}: not one of {', '.join(OPERATIONS)}")
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


def parser() -> Parser:
    """Return the parser of the command's flags."""
    p = Parser(
        prog="minillm profile",
        description="Measure this machine: each operation by PyTorch eagerly, compiled, by the "
        "vendor's kernels and by ours in Triton, and the model on top of them.",
        formatter_class=HelpFormatter,
    )
    add = p.add_argument
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
        choices=DTYPES,
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
    return p
