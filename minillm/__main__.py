"""Run `minillm VERB` and `python -m minillm VERB`; train and sample are train.py and sample.py."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from minillm import __version__, errors
from minillm.runtime import program
from minillm.runtime.cli import nearest
from minillm.runtime.launch import PACKAGES, answered, shell_command

VERBS = {
    "train": ("minillm.scripts.train", "train a decoder on text"),
    "sample": ("minillm.scripts.sample", "generate text from a run"),
    "prepare": ("minillm.commands.prepare", "turn text into a tokenizer and token shards"),
    "plan": ("minillm.commands.plan", "estimate a training's memory and time before it runs"),
    "profile": ("minillm.commands.profile", "measure the kernels and the model on this machine"),
}

EXAMPLES = (("train",), ("sample", "--prompt", "def "), ("plan", "--preset", "small"))


def main() -> int:
    """Run the verb on the command line and return the exit code."""
    verb, rest = (sys.argv[1:2] or [None])[0], sys.argv[2:]
    if verb not in VERBS:
        return program.run("minillm", _about, sys.argv[1:])
    # Help and refusals come first, because they do not need torch, whose import takes seconds.
    needs = ("numpy", "sentencepiece") if verb == "prepare" else PACKAGES
    code = answered(f"minillm {verb}", import_module(f"minillm.flags.{verb}").parse, rest, needs)
    if code is not None:
        return code
    body: Callable[[Sequence[str]], None] = import_module(VERBS[verb][0]).main
    if verb != "train":
        return program.run(f"minillm {verb}", body, rest)
    from minillm.distributed.ranks import first_to_say, leave

    return leave(program.run("minillm train", body, rest, first_to_say))


def _about(argv: Sequence[str]) -> None:
    verbs = "\n".join(f"  {verb:10} {what}" for verb, (_, what) in VERBS.items())
    start = shell_command("VERB")
    examples = "\n".join(f"  {shell_command(*words)}" for words in EXAMPLES)
    usage = (
        f"usage: {start} [flags]\n       {start} --help shows the flags of a verb\n\n"
        f"verbs:\n{verbs}\n\nflags:\n  --version  print the version\n\nexamples:\n{examples}"
    )
    if argv and argv[0] in ("-h", "--help"):
        print(usage)
    elif argv and argv[0] == "--version":
        print(f"minillm {__version__}")
    elif argv:
        near = nearest(argv[0], VERBS)
        hint = f"did you mean {near}?" if near else f"one of: {', '.join(VERBS)}"
        raise errors.UsageError(f"unknown verb {argv[0]!r}; {hint}")
    else:
        raise errors.UsageError(f"which verb? one of: {', '.join(VERBS)}; see --help")


if __name__ == "__main__":
    sys.exit(main())
