"""Flags of `minillm plan`: train.py's flags, and those of the machines to plan for."""

from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from functools import partial

from minillm.config.flags import ALIASES
from minillm.errors import UsageError
from minillm.flags import train
from minillm.planning import cards
from minillm.planning.cards import HOST_GBS, LATENCY_US, MFU, NODE_GPUS, OVERLAP
from minillm.runtime.cli import Parser, path, real, whole
from minillm.runtime.launch import shell_command

COMMON = (
    *("gpu", "gpus", "preset", "zero", "n_layer", "n_head", "d_model", "seq_len"),
    *("batch_size", "micro_batch_size", "activation_checkpointing", "json", "help"),
)


def parse(argv: Sequence[str]) -> Namespace:
    """Parse the flags of `minillm plan`; raise UsageError on flags that do not fit together."""
    args = parser().parse(argv)
    _check(args)
    train.check(args)
    return args


def _check(args: Namespace) -> None:
    """Raise UsageError on flags that exclude each other."""
    given = (args.link_gbs, args.latency_us, args.node_gpus, args.node_link_gbs)
    if args.links and any(value is not None for value in given):
        raise UsageError("--links and --link-gbs, --latency-us, --node-... exclude each other")
    if args.gpu is not None:
        cards.find(args.gpu)  # raises before torch is imported
    if args.print_config:
        raise UsageError("--print-config is train.py's; leave it out")


def parser() -> Parser:
    """Return the parser of the flags of `minillm plan`."""
    start = partial(shell_command, "plan")
    p = Parser(
        prog=start(),
        description="Estimate what a training takes, before it runs: parameters, FLOPs, memory of "
        "each rank and whether it fits, and time. It takes train.py's flags. Nothing is trained or "
        "written. The exit code is 0 whether or not the training fits; --json says so in "
        "verdict.fits.",
        epilog=train.EPILOG,
        aliases=ALIASES,
        common=COMMON,
        examples=(
            (start(), "memory and time of train.py without flags on this machine"),
            (start("--preset", "small", "--gpu", "rtx-4090"), "whether a preset fits on a card"),
            (start("--preset", "large", "--gpu", "h100", "--gpus", 64, "--zero", 2),
             "on 64 cards, with gradients sharded"),
        ),
        values=train.values,
    )  # fmt: skip
    _add_to(p)
    train.add_to(p)
    next(
        a for a in p._actions if a.dest == "print_config"
    ).help = SUPPRESS  # _check raises UsageError on it
    return p


def _add_to(p: Parser) -> None:
    add = p.add_argument_group("plan").add_argument
    above = {"type": real(0, above=True), "metavar": "X"}
    add("--gpu", metavar="NAME",
        help=f"card to plan for, with the figures of its data sheet: {', '.join(cards.NAMES)} "
        "(default: the device of this machine, measured)")  # fmt: skip
    add("--gpus", type=whole(1, 1_000_000), default=1, metavar="N",
        help="number of ranks, one per GPU")  # fmt: skip
    add("--links", type=path, metavar="FILE",
        help="measured links of this machine, as benchmarks/zero/fit.py writes them")  # fmt: skip
    add("--link-gbs", **above,
        help="one-way bandwidth of a rank's link within a node, in GB/s (default: the "
        "card's)")  # fmt: skip
    add("--latency-us", type=real(0), metavar="X",
        help=f"latency of a message in microseconds (default: {LATENCY_US:g})")  # fmt: skip
    add("--node-gpus", type=whole(1, 1_000_000), metavar="N",
        help=f"number of ranks in each node (default: {NODE_GPUS})")  # fmt: skip
    add("--node-link-gbs", **above,
        help="one-way bandwidth of a rank's link to other nodes, in GB/s (default: that of usual "
        "machines with the card)")  # fmt: skip
    add("--flops", **above,
        help="peak speed of a GPU that is not in the table, in FLOP/s, such as 990e12")  # fmt: skip
    add("--memory-gbs", **above, help="bandwidth of that GPU's memory in GB/s")
    add("--memory-gib", **above,
        help="memory of a rank in GiB (default: the card's, or what this machine has)")  # fmt: skip
    add("--mfu", type=real(0, 1, above=True), metavar="X",
        help="share of the peak that training reaches, 0 to 1; an assumption, not measured "
        f"(default: {MFU:g})")  # fmt: skip
    add("--host-gbs", **above,
        help="bandwidth to the host's memory in GB/s, for --offload "
        f"(default: {HOST_GBS:g})")  # fmt: skip
    add("--overlap", type=real(0, 1), metavar="X",
        help="share of the communication that runs during computation, 0 to 1 "
        f"(default: {OVERLAP:g}; 0 with --links)")  # fmt: skip
    add("--json", action="store_true",
        help="print one JSON object in base units (bytes, seconds) instead of tables")  # fmt: skip
