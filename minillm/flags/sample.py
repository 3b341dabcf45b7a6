"""The command line of sample.py."""

import argparse
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from minillm.errors import UsageError
from minillm.inference.exit_rules import DEFAULTS, LONGEST, exit_rule
from minillm.runtime import cli
from minillm.runtime.launch import shell_command
from minillm.runtime.terminal import decoded

COMMON = (
    *("run", "prompt", "interactive", "max_tokens", "num_samples", "temperature", "top_k", "top_p"),
    *("stop", "seed", "checkpoint", "device", "json", "help"),
)
ALIASES = {"--start": "--prompt", "--max-new-tokens": "--max-tokens"}


def parse(argv: Sequence[str]) -> Namespace:
    """Parse sample.py's flags; raise UsageError on flags that do not fit together."""
    args = parser().parse(argv)
    if args.prompt is not None and args.prompt_file is not None:
        raise UsageError("--prompt and --prompt-file exclude each other; give one")
    if args.interactive and (args.prompt is not None or args.prompt_file is not None):
        raise UsageError("--interactive reads its prompts; drop --prompt, --prompt-file")
    exit_rule(args.exit_by, args.exit_threshold, args.exit_patience)
    cli.check_device(args.device)
    if args.run is not None and not Path(args.run).expanduser().exists():
        raise UsageError(f"{args.run}: no such run")
    return args


def parser() -> cli.Parser:
    """Return the parser of sample.py's flags."""
    start = partial(shell_command, "sample")
    p = cli.Parser(
        prog=start(),
        description="Generate text from a trained run.",
        epilog="The filters apply in this order: repetition penalty, temperature, top-k, top-p, "
        "min-p. When the text is longer than the model's context, its older half is forgotten.",
        aliases=ALIASES,
        common=COMMON,
        examples=(
            (start("--prompt", "def "), "continue a text with the newest run"),
            (start("runs/nano-1", "--temperature", 0, "--max-tokens", 50),
             "50 tokens of a certain run, always the likeliest"),
            (start("--interactive"), "continue each line that is typed"),
        ),
    )  # fmt: skip
    _add_text(p)
    _add_recurrence(p.add_argument_group("recurrent models"))
    _add_computation(p.add_argument_group("computation"))
    return p


def _add_text(p: cli.Parser) -> None:
    add, whole, real = p.add_argument, cli.whole, cli.real
    add("run", nargs="?", metavar="RUN", type=cli.path_text,
        help="run folder (default: the newest in runs/)")  # fmt: skip
    add("--prompt", type=decoded, metavar="TEXT", help="text to continue (default: none)")
    add("--prompt-file", metavar="FILE", type=cli.path_text,
        help="UTF-8 file whose text to continue")  # fmt: skip
    add("--interactive", action="store_true", help="read prompts from standard input, one a line")
    add("--max-tokens", type=whole(1, 10**7), default=200, metavar="N",
        help="largest number of new tokens in a sample")  # fmt: skip
    add("--num-samples", type=whole(1, 4096), default=1, metavar="N",
        help="number of samples, generated as one batch")  # fmt: skip
    add("--temperature", type=real(0), default=0.8, metavar="X",
        help="factor of randomness (0: always the most likely token)")  # fmt: skip
    add("--top-k", type=whole(0), default=0, metavar="K",
        help="sample from the K most likely tokens (0: no limit)")  # fmt: skip
    add("--top-p", type=real(0, 1, above=True), default=0.95, metavar="P",
        help="sample from the most likely tokens that have probability P together "
        "(1: no limit)")  # fmt: skip
    add("--min-p", type=real(0, 1), default=0.0, metavar="P",
        help="drop tokens less likely than P times the most likely one (0: none)")  # fmt: skip
    add("--repetition-penalty", type=real(0.01, 100), default=1.0, metavar="X",
        help="make tokens that are already in the text less likely (1: no change)")  # fmt: skip
    add(
        "--stop",
        type=decoded,
        action="append",
        metavar="TEXT",
        help="text to end before; may be repeated",
    )
    add("--seed", type=whole(0, 2**63 - 1), default=0, metavar="N",
        help="random seed; the same seed gives the same text")  # fmt: skip
    add("--checkpoint", default="last", metavar="NAME", help="checkpoint: last, best or a step")
    add("--json", action="store_true", help="print one JSON object for each sample")


def _add_recurrence(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--recurrence", type=cli.whole(1), metavar="R",
        help="number of iterations of the core; fewer are faster "
        "(default: the model's mean)")  # fmt: skip
    add("--recurrent-cache", choices=("full", "slot"), default="full",
        help="which keys and values to keep. full: those of every iteration, which changes no "
        "token (in bf16 up to rounding); slot: only those of the last, in memory that does not "
        "grow with the iterations")  # fmt: skip
    add("--exit-by", choices=tuple(DEFAULTS), metavar="RULE",
        help="rule by which a token leaves the core early; prompts are read at the full "
        "recurrence. confidence: the most likely next token is likely enough, the best rule so "
        "far; kl: the distribution hardly changes; both cost the coda and the head in every "
        "iteration; latent: the state hardly changes (default: no early exit)")  # fmt: skip
    add("--exit-threshold", type=cli.real(0), metavar="X",
        help="threshold of the --exit-by rule (default: " + usual(0) + ")")  # fmt: skip
    add("--exit-patience", type=cli.whole(0, LONGEST), metavar="N",
        help="number of further iterations for which the rule must hold "
        "(default: " + usual(1) + ")")  # fmt: skip
    add("--warm-start", action="store_true",
        help="start the iterations of each token from the last state of the token before it; the "
        "text then differs from the one without")  # fmt: skip
    add("--draft-recurrence", type=cli.whole(1), metavar="R",
        help="speculative decoding: draft tokens with R iterations and verify them together at "
        "--recurrence: the same text in fp32, up to rounding in bf16")  # fmt: skip


def _add_computation(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", default="auto", metavar="NAME",
        help="device: cpu, cuda, cuda:N or mps (auto: a GPU if there is one)")  # fmt: skip
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16"),
        help="number format of the computation (auto: bf16 on a GPU, fp32 on a CPU)")  # fmt: skip
    add("--threads", type=threads, default="auto", metavar="N",
        help="number of processor threads (auto: one for small models, else one or all, whichever "
        "is faster now)")  # fmt: skip
    add("--kernels", default="auto", choices=("auto", "triton", "eager"),
        help="implementation of the operations (auto: triton on a GPU, else eager)")  # fmt: skip


def usual(which: int) -> str:
    """The defaults of --exit-by in words: its thresholds (0) or patience (1)."""
    return ", ".join(f"{name} {values[which]:g}" for name, values in DEFAULTS.items())


def threads(text: str) -> str | int:
    """`auto` or a number of threads."""
    return text if text == "auto" else cli.whole(1, 4096)(text)
