"""The command line of sample.py."""

from argparse import Namespace
from collections.abc import Sequence

from minillm import cli
from minillm.errors import UsageError
from minillm.exit_rules import DEFAULTS, LONGEST, exit_rule

ALIASES = {"--start": "--prompt", "--max-new-tokens": "--max-tokens"}


def parse(argv: Sequence[str]) -> Namespace:
    """Parse sample.py's flags; raise UsageError on flags that do not fit together."""
    args = parser().parse(argv)
    if args.prompt is not None and args.prompt_file is not None:
        raise UsageError("--prompt and --prompt-file exclude each other; give one")
    if args.interactive and (args.prompt is not None or args.prompt_file is not None):
        raise UsageError("--interactive reads its prompts; drop --prompt, --prompt-file")
    exit_rule(args.exit_by, args.exit_threshold, args.exit_patience)
    return args


def parser() -> cli.Parser:
    """The parser of sample.py's flags."""
    p = cli.Parser(
        prog="sample.py",
        description="Generate text from a trained run.",
        epilog="nanoGPT's --start and --max-new-tokens are understood too. Filters apply in this "
        "order: repetition penalty, temperature, top-k, top-p, min-p. Beyond the model's context "
        "the oldest half of it is forgotten.",
        aliases=ALIASES,
        formatter_class=cli.HelpFormatter,
    )
    add, whole, real = p.add_argument, cli.whole, cli.real
    add("run", nargs="?", metavar="RUN", help="run folder (default: the newest in runs/)")
    add("--prompt", metavar="TEXT", help="text to continue (default: none)")
    add("--prompt-file", metavar="FILE", help="UTF-8 file to continue")
    add("--interactive", action="store_true", help="read a prompt a line from standard input")
    add("--max-tokens", type=whole(1, 10**7), default=200, help="new tokens a sample")
    add("--num-samples", type=whole(1, 4096), default=1, help="samples, made at once")
    add("--temperature", type=real(0), default=0.8, help="0: always the likeliest token")
    add("--top-k", type=whole(0), default=0, help="of the so many likeliest; 0: of all")
    add("--top-p", type=real(0, 1, above=True), default=0.95, help="of the likeliest, by mass")
    add("--min-p", type=real(0, 1), default=0.0, help="of those this share as likely as the best")
    add(
        "--repetition-penalty", type=real(0.01, 100), default=1.0,
        help="above 1: shun what the text already has",
    )  # fmt: skip
    add(
        "--recurrence", type=whole(1), metavar="R",
        help="iterations of a recurrent model's core: fewer are faster, more think longer "
        "(default: the model's mean)",
    )  # fmt: skip
    add(
        "--recurrent-cache", choices=("full", "slot"), default="full",
        help="keys and values of every iteration, which changes no token (in bf16 up to rounding), "
        "or of the last alone, in memory that does not grow with them",
    )  # fmt: skip
    add(
        "--exit-by", choices=tuple(DEFAULTS),
        help="let each token leave the core when it may; prompts are read at the full recurrence. "
        "confidence: the likeliest token is sure, the rule that worked; kl: the distribution "
        "hardly changes; both cost the coda and the head in every iteration; latent: the state "
        "hardly changes, which tokens that wait for others do as well (default: none leaves)",
    )  # fmt: skip
    add("--exit-threshold", type=real(0), help="of --exit-by (default: " + usual(0) + ")")
    add(
        "--exit-patience", type=whole(0, LONGEST),
        help="further iterations that the rule must hold (default: " + usual(1) + ")",
    )  # fmt: skip
    add(
        "--warm-start", action="store_true",
        help="start each token's iterations where the one before it ended, which may settle them "
        "sooner, or later; the text is not that of reading it at once",
    )  # fmt: skip
    add(
        "--draft-recurrence", type=whole(1), metavar="R",
        help="draft tokens with so many iterations and verify them at --recurrence in one pass: "
        "the same text in fp32, up to rounding in bf16; faster where memory is the limit",
    )  # fmt: skip
    add("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    add("--seed", type=whole(0, 2**63 - 1), default=0, help="the same seed makes the same text")
    add("--checkpoint", default="last", help="last, best or a step")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="of the computation")
    add("--threads", type=threads, default="auto", help="auto: one for small models, else timed")
    add("--kernels", default="auto", choices=("auto", "triton", "eager"), help="operations")
    add("--json", action="store_true", help="one object a sample instead of plain text")
    return p


def usual(which: int) -> str:
    """The defaults of --exit-by in words: its thresholds (0) or patience (1)."""
    return ", ".join(f"{name} {values[which]:g}" for name, values in DEFAULTS.items())


def threads(text: str) -> str | int:
    """`auto` or a number of threads."""
    return text if text == "auto" else cli.whole(1, 4096)(text)
