"""The command line of sample.py; its sampling flags are the fields of SamplingParams."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

from minillm.config.flags import metavar_of, parser_of
from minillm.config.sampling import SamplingParams
from minillm.errors import UsageError
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
    sampling_of(args)
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
             "50 tokens from a given run, always the most likely ones"),
            (start("--interactive"), "continue each line that is typed"),
        ),
    )  # fmt: skip
    _add_text(p)
    _add_sampling(p)
    _add_output(p)
    _add_computation(p)
    return p


def sampling_of(args: Namespace) -> SamplingParams:
    """Return the sampling parameters of the flags; raise UsageError if two exclude each other."""
    return SamplingParams(**{f.name: getattr(args, f.name) for f in fields(SamplingParams)})


def _add_text(p: cli.Parser) -> None:
    add = p.add_argument
    add("run", nargs="?", metavar="RUN", type=cli.path_text,
        help="run folder (default: the newest in runs/)")  # fmt: skip
    add("--prompt", type=decoded, metavar="TEXT", help="text to continue (default: none)")
    add("--prompt-file", metavar="FILE", type=cli.path_text,
        help="UTF-8 file whose text to continue")  # fmt: skip
    add("--interactive", action="store_true", help="read prompts from standard input, one a line")


def _add_output(p: cli.Parser) -> None:
    add = p.add_argument
    add("--num-samples", type=cli.whole(1, 4096), default=1, metavar="N",
        help="number of samples, generated as one batch")  # fmt: skip
    add("--checkpoint", default="last", metavar="NAME", help="checkpoint: last, best or a step")
    add("--json", action="store_true", help="print one JSON object for each sample")


def _add_sampling(p: cli.Parser) -> None:
    """Add one flag for each field of SamplingParams, with the default and the range it has."""
    group = p
    for f in fields(SamplingParams):
        if "group" in f.metadata:
            group = p.add_argument_group(f.metadata["group"])
        options = {"help": f.metadata["help"].replace("%", "%%")}
        if f.type is bool:
            options |= {"action": "store_true"}
        else:
            options |= {"type": parser_of(f), "metavar": metavar_of(f)}
            options |= {"action": "append"} if f.metadata.get("many") else {"default": f.default}
        group.add_argument("--" + f.name.replace("_", "-"), **options)


def _add_computation(p: cli.Parser) -> None:
    add = p.add_argument_group("computation").add_argument
    add("--device", default="auto", metavar="NAME",
        help="device: cpu, cuda, cuda:N or mps (auto: a GPU if there is one)")  # fmt: skip
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16"),
        help="number format of the computation (auto: bf16 on a GPU, fp16 on one older than "
        "Ampere, fp32 on a CPU and on mps)")  # fmt: skip
    add("--threads", type=threads, default="auto", metavar="N",
        help="number of processor threads (auto: one for small models, else one or all, whichever "
        "is faster now)")  # fmt: skip
    add("--kernels", default="auto", choices=("auto", "triton", "eager"),
        help="implementation of the operations (auto: triton on a GPU, else eager)")  # fmt: skip


def threads(text: str) -> str | int:
    """Return `auto`, or the number of threads as an integer."""
    return text if text == "auto" else cli.whole(1, 4096)(text)
