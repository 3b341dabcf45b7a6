"""Generate text from a trained run.

    python sample.py --prompt "def "                  the newest run
    python sample.py runs/nano-1 --top-p 0.9 --num-samples 4 --json
    python sample.py --interactive                    a prompt a line

Text goes to standard output as it is made, everything else to standard error.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from minillm import errors
from minillm.flags import sample as flags
from minillm.runtime import program
from minillm.runtime.launch import answer

if __name__ == "__main__":  # help and refusals need no torch, whose import takes seconds
    answer("sample.py", flags.parse, sys.argv[1:])

from minillm.checkpoint import find as checkpoint
from minillm.checkpoint.run_folder import newest_run
from minillm.data.tokenizer import Tokenizer
from minillm.inference.exit_rules import exit_rule
from minillm.inference.generate import generate
from minillm.inference.sampling_params import check_recurrence
from minillm.inference.speculative import speculate
from minillm.inference.text_stream import TextStream
from minillm.model.gpt import GPT
from minillm.model.kv_cache import slots
from minillm.model.size import n_parameters
from minillm.runtime import device as world, terminal
from minillm.runtime.json_text import json_text
from minillm.runtime.terminal import visible

SEPARATOR = "\n" + "-" * 20 + "\n"
ONE_THREAD_BELOW = 20_000_000  # parameters: smaller matrices are not worth sharing out


def main(argv: Sequence[str]) -> None:
    """Generate as the command line says."""
    args = flags.parse(argv)
    run = newest_run().path if args.run is None else Path(args.run)
    device = world.pick_device(args.device)
    # One token at a time is bound by memory: on a CPU bf16 is slower there than fp32.
    name = "fp32" if args.dtype == "auto" and device.type == "cpu" else args.dtype
    options = {
        "device": device,
        "dtype": world.pick_dtype(name, device, 0),
        "kernels": args.kernels,
    }
    step, (model, tokenizer, config) = checkpoint.while_there(
        run,
        args.checkpoint,
        lambda found: (found.step, checkpoint.load_run(run, checkpoint=found, **options)),
    )
    small = n_parameters(config) < ONE_THREAD_BELOW
    threads, _ = world.set_threads(1 if args.threads == "auto" and small else args.threads)
    note(f"{run}, step {step}, {device}, {model.ops.name} kernels ({model.ops.why}), "
         f"{threads} thread{'s' * (threads > 1)}, seed {args.seed}")  # fmt: skip
    for prompt in prompts(args):
        try:
            write(model, tokenizer, prompt, args)
        except errors.UsageError as error:
            if not args.interactive:
                raise
            note(f"error: {program.one_line(str(error))}")


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
    ids = tokenizer.prompt_ids(prompt, model.config.document_mask)
    if len(ids) > model.config.seq_len:
        kept = max(1, model.config.seq_len // 2)
        note(f"the prompt is {len(ids)} tokens long; only its last {kept} are read")
    ids, beginnings, shown = tokenizer.heal(ids)
    often, iterations = check_recurrence(model, args.recurrence, args.recurrent_cache)
    rule = exit_rule(args.exit_by, args.exit_threshold, args.exit_patience)
    of_a_core = {"--exit-by": rule, "--draft-recurrence": args.draft_recurrence,
                 "--warm-start": args.warm_start}  # fmt: skip
    if often is None and any(of_a_core.values()):
        given = ", ".join(flag for flag, value in of_a_core.items() if value)
        raise errors.UsageError(f"{given}: this model has no core to run again; leave it out")
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
    streams = [
        TextStream(tokenizer, args.stop or (), shown, starts=not prompt)
        for _ in range(args.num_samples)
    ]
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
            found = record(prompt, stream, logprobs[row], rounds[row], seconds)
            print(json_text(found), flush=True)
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
    sys.stdout.write(visible(text, sys.stdout))
    sys.stdout.flush()


def note(text: str) -> None:
    """One line on standard error."""
    terminal.say(text)


if __name__ == "__main__":
    sys.exit(program.run("sample.py", main, sys.argv[1:]))
