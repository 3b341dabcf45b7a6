"""Generate text from a trained run.

    python sample.py --prompt "def "                  the newest run
    python sample.py runs/nano-1 --top-p 0.9 --num-samples 4 --json
    python sample.py --interactive                    a prompt a line

Text goes to standard output as it is made, everything else to standard error.
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from minillm import checkpoint, cli, errors, runs, world
from minillm.cache import slots
from minillm.exits import DEFAULTS, LONGEST, exit_rule
from minillm.generate import generate
from minillm.model import GPT
from minillm.requests import check_recurrence
from minillm.speculate import speculate
from minillm.stream import TextStream
from minillm.tokenizer import Tokenizer

ALIASES = {"--start": "--prompt", "--max-new-tokens": "--max-tokens"}
SEPARATOR = "\n" + "-" * 20 + "\n"
ONE_THREAD_BELOW = 20_000_000  # parameters: smaller matrices are not worth sharing out


def main(argv: Sequence[str]) -> None:
    """Generate as the command line says."""
    args = command_line().parse(argv)
    if args.prompt is not None and args.prompt_file is not None:
        raise errors.UsageError("--prompt and --prompt-file exclude each other; give one")
    if args.interactive and (args.prompt is not None or args.prompt_file is not None):
        raise errors.UsageError("--interactive reads its prompts; drop --prompt, --prompt-file")
    run = runs.newest_run() if args.run is None else Path(args.run)
    device = world.pick_device(args.device)
    # One token at a time is bound by memory: on a CPU bf16 is slower there than fp32.
    name = "fp32" if args.dtype == "auto" and device.type == "cpu" else args.dtype
    found = checkpoint.open_checkpoint(run, args.checkpoint)
    model, tokenizer, config = checkpoint.load_run(
        run,
        checkpoint=found,
        device=device,
        dtype=world.pick_dtype(name, device, 0),
        kernels=args.kernels,
    )
    small = config.n_parameters < ONE_THREAD_BELOW
    threads, _ = world.set_threads(1 if args.threads == "auto" and small else args.threads)
    note(f"{run}, step {found.step}, {device}, {model.ops.name} kernels ({model.ops.why}), "
         f"{threads} thread{'s' * (threads > 1)}, seed {args.seed}")  # fmt: skip
    for prompt in prompts(args):
        try:
            write(model, tokenizer, prompt, args)
        except errors.UsageError as error:
            if not args.interactive:
                raise
            note(f"error: {errors.one_line(str(error))}")


def command_line() -> cli.Parser:
    """The parser of sample.py's flags."""
    p = cli.Parser(
        prog="sample.py",
        description=__doc__.split("\n")[0],
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


def prompts(args: Namespace) -> Iterator[str]:
    """The prompts to continue, one after the other."""
    if args.interactive:
        while True:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                return
            yield line.removesuffix("\n")
    elif args.prompt_file is not None:
        yield read_prompt(Path(args.prompt_file))
    else:
        yield args.prompt or ""


def read_prompt(path: Path) -> str:
    """The text of a prompt file. UsageError, with the place, if it is not UTF-8."""
    if not path.is_file():
        what = "is no regular file" if path.exists() else "no such file"
        raise errors.UsageError(f"--prompt-file {path}: {what}")
    if path.stat().st_size > 100 << 20:
        raise errors.UsageError(f"--prompt-file {path}: larger than 100 MiB; give its end alone")
    try:
        return path.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise errors.UsageError(f"--prompt-file {path}: not UTF-8 at byte {error.start}") from None


def write(model: GPT, tokenizer: Tokenizer, prompt: str, args: Namespace) -> None:
    """Make --num-samples continuations at once; the first streams, the others follow whole."""
    ids = tokenizer.prompt_ids(prompt)
    if len(ids) > model.config.seq_len:
        kept = max(1, model.config.seq_len // 2)
        note(f"the prompt is {len(ids)} tokens long; only its last {kept} are read")
    ids, beginnings, shown = tokenizer.heal(ids)
    often, iterations = check_recurrence(model, args.recurrence, args.recurrent_cache)
    rule = exit_rule(args.exit_by, args.exit_threshold, args.exit_patience)
    if often is None and (rule or args.draft_recurrence or args.warm_start):
        raise errors.UsageError(
            "--exit-by, --draft-recurrence, --warm-start: this model has no core to run again"
        )
    maker, more = generate, {
        "repetition_penalty": args.repetition_penalty,
        "recurrent_cache": args.recurrent_cache,
        "exit_rule": rule,
        "warm_start": args.warm_start,
    }  # fmt: skip
    if args.draft_recurrence is not None:
        slot, penalty = args.recurrent_cache == "slot", args.repetition_penalty != 1
        if rule or slot or penalty or args.warm_start:
            raise errors.UsageError(
                "--draft-recurrence goes with none of --exit-by, --warm-start, --recurrent-cache "
                "slot and --repetition-penalty"
            )
        maker, more = speculate, {"draft_recurrence": args.draft_recurrence}
    # Rows that stay in the core while others leave are copied.
    require_memory(model, args.num_samples, iterations or 1, 2 if rule else 1)
    streams = [TextStream(tokenizer, args.stop or (), shown) for _ in range(args.num_samples)]
    logprobs: list[list[float]] = [[] for _ in streams]
    rounds: list[list[int]] = [[] for _ in streams]
    start = time.perf_counter()
    live = None if args.json else 0
    show("" if args.json else prompt)
    tokens = maker(
        model,
        [ids] * args.num_samples,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        first=beginnings,
        stop=lambda row, made: streams[row].finish is not None,
        recurrence=args.recurrence,
        **more,
    )
    for token in tokens:
        text = streams[token.row].feed(token.id)
        if streams[token.row].finish != "document":
            logprobs[token.row].append(token.logprob)
            rounds[token.row].append(token.recurrence)
        if token.row == live:
            show(text)
    seconds = time.perf_counter() - start
    for row, stream in enumerate(streams):
        rest = stream.flush()
        if args.json:
            print(
                json.dumps(record(prompt, stream, logprobs[row], rounds[row], seconds)), flush=True
            )
        elif row == live:
            show(rest + "\n")
        else:
            show(SEPARATOR.lstrip() + prompt + stream.text + "\n")
    made = sum(len(s.ids) for s in streams)
    note(f"{made} tokens in {seconds:.2f} s, {made / seconds:.0f} tokens/s")


def require_memory(model: GPT, rows: int, iterations: int, copies: int) -> None:
    """Raise UnavailableError if the cache of so many rows cannot fit."""
    c, layers = model.config, slots(model.config.depths, iterations)
    each = copies * 2 * layers * c.seq_len * c.n_kv_head * c.d_head * model.dtype.itemsize
    free = world.available_memory(model.head.weight.device)
    if free is not None and rows * each > free:
        raise errors.UnavailableError(
            f"--num-samples {rows} needs {rows * each / 2**30:.1f} GiB of cache and "
            f"{free / 2**30:.1f} GiB are free; at most {free // each} fit"
            + "; --recurrent-cache slot takes less"
            * (iterations > 1)
        )


def record(
    prompt: str, stream: TextStream, logprobs: list[float], rounds: list, seconds: float
) -> dict:
    """One sample for --json; log-probabilities are the model's own, before any filter."""
    used = {"recurrences": rounds} if any(rounds) else {}
    return {
        "prompt": prompt,
        "text": stream.text,
        "tokens": stream.ids,
        "logprobs": [round(x, 6) for x in logprobs],
        "finish": stream.finish or "length",
        "tokens_per_s": round(len(stream.ids) / seconds, 1),
        **used,
    }


def show(text: str) -> None:
    """Text to standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(errors.run("sample.py", main, sys.argv[1:]))
