"""Generate text from a trained run.

    python sample.py --prompt "def "                  the newest run
    python sample.py runs/nano-1 --top-p 0.9 --num-samples 4 --json
    python sample.py --interactive                    one prompt a line

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

import torch

from minillm.checkpoint.run_folder import newest_run
from minillm.inference.complete import Completion, stream_text
from minillm.inference.language_model import LanguageModel, load
from minillm.runtime.json_text import json_text
from minillm.runtime.terminal import say, visible

SEPARATOR = "-" * 20 + "\n"


def main(argv: Sequence[str]) -> None:
    """Generate as the command line says."""
    args = flags.parse(argv)
    run = newest_run().path if args.run is None else Path(args.run)
    lm = load(run, device=args.device, dtype=args.dtype, checkpoint=args.checkpoint,
              kernels=args.kernels, threads=args.threads)  # fmt: skip
    ops, device, threads = lm.model.ops, lm.model.head.weight.device, torch.get_num_threads()
    say(f"{run}, step {lm.step}, {device}, {ops.name} kernels ({ops.why}), "
        f"{threads} thread{'s' * (threads > 1)}, seed {args.seed}")  # fmt: skip
    for prompt in prompts(args):
        try:
            write(lm, prompt, args)
        except errors.UsageError as error:
            if not args.interactive:
                raise
            say(f"error: {program.one_line(error.with_flags())}")


def prompts(args: Namespace) -> Iterator[str]:
    """Yield the prompts to continue, one after the other."""
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
    """Return the text of a prompt file; raise UsageError, with the place, if it is not UTF-8."""
    if not path.is_file():
        what = "is no regular file" if path.exists() else "no such file"
        raise errors.UsageError(f"--prompt-file {path}: {what}")
    if path.stat().st_size > 100 << 20:
        raise errors.UsageError(f"--prompt-file {path}: larger than 100 MiB; give its end alone")
    try:
        return path.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise errors.UsageError(f"--prompt-file {path}: not UTF-8 at byte {error.start}") from None


def write(lm: LanguageModel, prompt: str, args: Namespace) -> None:
    """Write --num-samples continuations, the first while it is generated, then the others.

    lm: the model and its tokenizer
    prompt: the text to continue
    args: the flags
    """
    found: list[Completion | None] = [None] * args.num_samples
    pieces = stream_text(
        lm.model, lm.tokenizer, [prompt] * args.num_samples, flags.sampling_of(args), say=say
    )
    start = time.perf_counter()
    show("" if args.json else prompt)
    for piece in pieces:
        if piece.row == 0 and not args.json:
            show(piece.text)
        found[piece.row] = piece.completion
    seconds = time.perf_counter() - start
    if args.json:
        for completion in found:
            print(json_text(record(completion, seconds)), flush=True)
    else:
        others = [SEPARATOR + prompt + completion.text + "\n" for completion in found[1:]]
        show("\n" + "".join(others))
    made = sum(len(completion.tokens) for completion in found)
    say(f"{made} tokens in {seconds:.2f} s, {made / seconds:.0f} tokens/s")


def record(completion: Completion, seconds: float) -> dict:
    """Return one sample as --json prints it.

    completion: the sample
    seconds: time that all samples of its batch took together
    """
    used = {"recurrences": completion.recurrences} if any(completion.recurrences) else {}
    return {
        "prompt": completion.prompt,
        "text": completion.text,
        "tokens": completion.tokens,
        "logprobs": [round(x, 6) for x in completion.logprobs],
        "finish": completion.finish,
        "tokens_per_s": round(len(completion.tokens) / seconds, 1),
        **used,
    }


def show(text: str) -> None:
    """Write text to standard output, at once."""
    sys.stdout.write(visible(text, sys.stdout))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(program.run("sample.py", main, sys.argv[1:]))
