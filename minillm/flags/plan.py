"""The command line of `minillm plan`: train.py's flags, and those of the cluster to plan for."""

from argparse import Namespace
from collections.abc import Sequence

from minillm.cli import Parser, path, real, whole
from minillm.errors import UsageError
from minillm.flags import train

MFU, OVERLAP = 0.4, 0.7
# One way, in GB/s: the nominal figures of NVLink 4 (H100, H200), and of 400 Gbit/s a GPU.
LINK_GBS, NODE_LINK_GBS = 450.0, 50.0
LATENCY_US, NODE_GPUS, HOST_GBS = 5.0, 8, 25.0


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
    if args.print_config:
        raise UsageError("--print-config is train.py's; leave it out")


def parser() -> Parser:
    """Return the parser of the command's flags."""
    p = train.parser(
        "What a training takes, before it runs: parameters, FLOPs, memory of a rank, time of a "
        "step. Takes train.py's flags; nothing is trained, written or sent."
    )
    p.prog = "minillm plan"
    add = p.add_argument_group("plan").add_argument
    above = {"type": real(0, above=True), "metavar": "X"}
    share = {"type": real(0, 1), "metavar": "X"}
    add("--gpus", type=whole(1, 1_000_000), default=1, metavar="N", help="ranks (default: 1)")
    add("--links", type=path, metavar="FILE",
        help="links as benchmarks/zero/fit.py found them on this machine")  # fmt: skip
    add("--link-gbs", **above, help=f"GB/s one way in a node (default: {LINK_GBS:g}, NVLink 4)")
    add("--latency-us", type=real(0), metavar="X",
        help=f"microseconds of a message (default: {LATENCY_US:g})")  # fmt: skip
    add("--node-gpus", type=whole(1, 1_000_000), metavar="N",
        help=f"ranks of a node (default: {NODE_GPUS})")  # fmt: skip
    add("--node-link-gbs", **above,
        help=f"GB/s one way between nodes, of each rank (default: {NODE_LINK_GBS:g})")  # fmt: skip
    add("--flops", **above, help="a rank's peak, FLOP/s, such as 990e12 (default: measured here)")
    add("--mfu", type=real(0, 1, above=True), metavar="X",
        help=f"share of the peak that training reaches (default: {MFU:g})")  # fmt: skip
    add("--memory-gbs", **above, help="GB/s of a rank's memory (default: measured here)")
    add("--host-gbs", **above,
        help=f"GB/s to the host's memory, with --offload (default: {HOST_GBS:g})")  # fmt: skip
    add("--overlap", **share, help="share of the communication that runs beside computation, where "
        f"it can (default: {OVERLAP:g}; 0 with --links)")  # fmt: skip
    add("--json", action="store_true", help="one JSON object instead of tables")
    return p
