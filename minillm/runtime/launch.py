"""Find out how this process was started, its rank, and answer --help and errors at once.

This is the only file that reads the environment. It imports neither torch nor any other module that
takes long to import.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from minillm.errors import UnavailableError, UsageError
from minillm.runtime import program

PACKAGES = ("torch", "numpy", "sentencepiece", "tqdm", "safetensors")


def answer(name: str, parse: Callable[[Sequence[str]], object], argv: Sequence[str]) -> None:
    """Exit if the command line asks for help or the version, or is refused.

    A script calls this before it imports torch, which takes seconds. The function returns if there
    is work to do.

    name: name of the program in messages
    parse: parser of the command line
    argv: the command line
    """
    if (code := answered(name, parse, argv)) is not None:
        sys.exit(code)


def answered(
    name: str,
    parse: Callable[[Sequence[str]], object],
    argv: Sequence[str],
    needs: Sequence[str] = PACKAGES,
) -> int | None:
    """Return the exit code if parsing has answered the command line, else None.

    On several ranks nothing is answered here. Which of them prints an error is decided when they
    can communicate (ranks.first_to_say).

    name: name of the program in messages
    parse: parser of the command line
    argv: the command line
    needs: packages that the program needs
    """
    if "RANK" in os.environ:
        return None
    parsed = []

    def work(words: Sequence[str]) -> None:
        args = parse(words)
        if missing := [package for package in needs if find_spec(package) is None]:
            names = " ".join(missing)
            raise UnavailableError(f"{names}: not installed here; install with pip install {names}")
        parsed.append(args)

    code = program.run(name, work, argv)
    return None if parsed else code


def can_redraw_lines() -> bool:
    """Return whether the terminal can write over a line, which a dumb one cannot."""
    return os.environ.get("TERM") != "dumb"


def shell_command(verb: str, *words: object) -> str:
    """Return a command to paste into the shell.

    It has the form in which this process was started: a script of the checkout, `python -m minillm
    VERB`, or the console script `minillm VERB`. For several ranks it starts torchrun.

    verb: train, sample, prepare, ...
    words: flags and values; they are quoted if need be
    """
    python, what = _started(verb)
    world = launched()
    if world.size > 1 and verb == "train":
        python = f"torchrun --standalone --nproc-per-node {world.local_size}"
        what = "-m minillm train" if what == verb else what
    return " ".join([python, what, *(shlex.quote(str(word)) for word in words)])


def _started(verb: str) -> tuple[str, str]:
    """Return the program, and the script, module or verb, that start a verb."""
    script, root = Path(sys.argv[0]), Path(__file__).resolve().parents[2]
    python = _typed(sys.orig_argv[0] or sys.executable)
    if script.stem == "minillm":
        return _typed(str(script)), verb
    is_ours = script.name in ("train.py", "sample.py")
    if is_ours and (beside := script.with_name(f"{verb}.py")).is_file():
        return python, shlex.quote(str(beside))
    if is_ours or script.name == "__main__.py" and script.parent.name == "minillm":
        return python, f"-m minillm {verb}"
    # A test, or the user's own program.
    return "python", f"{verb}.py" if (root / f"{verb}.py").is_file() else f"-m minillm {verb}"


def _typed(program: str) -> str:
    """Return a program as it is typed, by its name alone if the shell finds it."""
    name = Path(program).name
    found = shutil.which(name)
    if program == name or found and Path(found).absolute() == Path(program).absolute():
        return name
    return shlex.quote(program)


@dataclass(frozen=True)
class World:
    """This process and the other ranks, as the launcher describes them.

    rank: number of this process over all machines
    size: number of processes over all machines
    local_rank: number of this process on its machine
    local_size: number of processes on its machine
    node: number of the machine
    nodes: number of machines
    attempt: number of times that torchrun has restarted the job
    launch: name of the job, see ranks.with_launch_name
    address: host name of the store
    port: port of the store
    has_store: True if the launcher runs the store, False if rank 0 must
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    nodes: int = 1
    attempt: int = 0
    launch: str | None = None
    address: str = "127.0.0.1"
    port: int = 29500
    has_store: bool = False


def launched() -> World:
    """Return the ranks that torchrun describes in the environment, or a single process without it.

    Raises UsageError if the description is not valid.
    """
    said = os.environ
    size = _number("WORLD_SIZE", 1)
    if size == 1 and "RANK" not in said:
        return World()
    if "RANK" not in said or "MASTER_ADDR" not in said:
        _, what = _started("train")
        what = "-m minillm train" if what == "train" else what
        raise UsageError(
            f"WORLD_SIZE is {size}, but RANK or MASTER_ADDR is not set; start with "
            f"torchrun --nproc-per-node {size} {what}"
        )
    return World(
        rank=_number("RANK", 0), size=size,
        local_rank=_number("LOCAL_RANK", 0), local_size=_number("LOCAL_WORLD_SIZE", size),
        node=_number("GROUP_RANK", 0), nodes=_number("GROUP_WORLD_SIZE", 1),
        attempt=_number("TORCHELASTIC_RESTART_COUNT", 0),
        address=said["MASTER_ADDR"], port=_number("MASTER_PORT", 29500),
        has_store=said.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )  # fmt: skip


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name} is {text!r}; expected a whole number")
    return int(text)
