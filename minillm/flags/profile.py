"""The command line of `minillm profile`."""

import os
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from minillm.errors import UsageError
from minillm.runtime.cli import Parser, check_device, path, whole
from minillm.runtime.files import check_place
from minillm.runtime.launch import shell_command

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
    check_device(args.device)
    _check(args, suites(args))
    return args


def suites(args: Namespace) -> tuple[str, ...]:
    """Return the suites to run, in order; `kernels` if the flags name none."""
    names = () if args.tune is None else ("tune",)
    if args.suite or not (args.trace or names):
        names += SUITES if args.suite == "all" else (args.suite or "kernels",)
    return names


def _check(args: Namespace, names: tuple[str, ...]) -> None:
    if args.op and not set(names) & set(BY_OP):
        suites = ", ".join(BY_OP)
        raise UsageError(f"--op: only {suites} take it; leave it out, or add --suite kernels")
    if args.full and args.suite not in ("audit", "all"):
        raise UsageError("--full: only the audit takes it; add --suite audit or all")
    if args.dtype and set(names) <= {"audit", "tune"}:
        raise UsageError("--dtype: the audit and --tune take every dtype; leave it out")
    if names:
        check_place("out", args.out or Path("benchmarks"))
    if args.trace:
        if args.trace.is_dir():
            raise UsageError(f"--trace {args.trace}: is a folder; name a file")
        if os.path.lexists(args.trace):
            raise UsageError(f"--trace {args.trace}: exists already; name a new file")
        check_place("trace", args.trace.parent)


def parser() -> Parser:
    """Return the parser of the flags of `minillm profile`."""
    start = partial(shell_command, "profile")
    p = Parser(
        prog=start(),
        description="Measure this machine: each operation by PyTorch eagerly, compiled, by the "
        "vendor's kernels and by minillm's kernels in Triton, and whole models.",
        examples=(
            (start("--quick"), "measure each operation roughly, in seconds"),
            (start("--suite", "model"), "measure training steps"),
            (start("--suite", "kernels", "--op", "attention", "--trace", "trace.json"),
             "measure one operation, and record training steps for ui.perfetto.dev"),
        ),
    )  # fmt: skip
    add = p.add_argument
    add("--suite", choices=(*SUITES, "all"), metavar="NAME",
        help="what to measure. kernels: each operation; model: a training step; decode: tokens a "
        "second; audit: the machine code, compiled without a GPU; roofline: the operations against "
        "what this machine can do; all (default: kernels, unless --tune or --trace is "
        "given)")  # fmt: skip
    add("--full", action="store_true",
        help="audit every kernel, size, dtype and feature instead of some")  # fmt: skip
    add("--op", action="append", metavar="NAME", choices=OPERATIONS,
        help="operation to measure in the suites kernels, roofline and audit; may be repeated "
        "(default: all)")  # fmt: skip
    add("--dtype", choices=DTYPES,
        help="number format of the data (default: bf16 on a GPU, fp32 on a CPU)")  # fmt: skip
    add("--device", default="auto", metavar="NAME",
        help="device: cpu, cuda or cuda:N (auto: a GPU if there is one)")  # fmt: skip
    add("--threads", default="auto", type=threads, metavar="N",
        help="number of processor threads (auto: one or all, whichever is faster now)")  # fmt: skip
    add("--out", type=path, metavar="DIR",
        help="folder for results.json, a CSV of each suite and index.html; results of earlier runs "
        "in it stay (default: benchmarks/DEVICE-DATE)")  # fmt: skip
    add("--trace", type=path, metavar="FILE",
        help="Perfetto trace of training steps to write; a new file")  # fmt: skip
    add("--tune", nargs="*", metavar="OP",
        help="measure tile sizes on a GPU around those in kernels/tiles, of these operations or of "
        "all, and write the best into this GPU's tables")  # fmt: skip
    add("--quick", action="store_true",
        help="measure in seconds: small sizes, few runs, nothing compiled")  # fmt: skip
    return p


def threads(text: str) -> str | int:
    """Parse `auto` or a number of threads."""
    return text if text == "auto" else whole(1, 4096)(text)
