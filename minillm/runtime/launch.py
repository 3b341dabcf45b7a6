"""How this process was started: its place among the ranks, and what can be answered at once.

This is the only file that reads the environment. It imports neither torch nor anything else that
takes long.
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
    """Exit if `parse(argv)` answers the command line: with help, a version or a refusal.

    A script calls this before it imports torch, which takes seconds. It returns where there is
    work to do.
    """
    if (code := answered(name, parse, argv)) is not None:
        sys.exit(code)


def answered(
    name: str,
    parse: Callable[[Sequence[str]], object],
    argv: Sequence[str],
    needs: Sequence[str] = PACKAGES,
) -> int | None:
    """Return the exit code if `parse(argv)` has answered the command line, else None.

    name: the program's name in a refusal.
    needs: packages without which the work is refused.
    Of several ranks none answers here: which of them prints a refusal is decided when they can
    talk to one another (ranks.first_to_say).
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
    """Return whether a terminal can write over a line; one that calls itself dumb cannot."""
    return os.environ.get("TERM") != "dumb"


def shell_command(verb: str, *words: object) -> str:
    """Return the command that runs `verb` with `words`, to be pasted into the shell.

    It is started as this process was: from a script of the checkout, as `python -m minillm VERB`,
    or by the console script `minillm VERB`. Of several ranks on one machine it starts all.

    verb: train, sample, prepare, ...
    words: flags and values; those that the shell would take apart are quoted.
    """
    python, what = _started(verb)
    world = launched()
    if world.size > 1 and verb == "train":
        python = f"torchrun --standalone --nproc-per-node {world.local_size}"
        what = "-m minillm train" if what == verb else what
    return " ".join([python, what, *(shlex.quote(str(word)) for word in words)])


def _started(verb: str) -> tuple[str, str]:
    """Return the program and the script, module or verb with which `verb` is started."""
    script, root = Path(sys.argv[0]), Path(__file__).resolve().parents[2]
    python = _typed(sys.orig_argv[0] or sys.executable)
    if script.stem == "minillm":
        return _typed(str(script)), verb
    is_ours = script.name in ("train.py", "sample.py")
    if is_ours and (beside := script.with_name(f"{verb}.py")).is_file():
        return python, shlex.quote(str(beside))
    if is_ours or script.name == "__main__.py" and script.parent.name == "minillm":
        return python, f"-m minillm {verb}"
    # A test, or a program of the user's.
    return "python", f"{verb}.py" if (root / f"{verb}.py").is_file() else f"-m minillm {verb}"


def _typed(program: str) -> str:
    """Return the program as it is typed: by its name alone where the shell finds it so."""
    name = Path(program).name
    found = shutil.which(name)
    if program == name or found and Path(found).absolute() == Path(program).absolute():
        return name
    return shlex.quote(program)


@dataclass(frozen=True)
class World:
    """What the launcher says of this process and the others.

    rank, size: over all machines.    local_rank, local_size: on this machine, number `node` of
    `nodes`.    attempt: how often torchrun has restarted the job.    launch: a name of the job, see
    ranks.with_launch_name.
    address, port: of the store; has_store: whether the launcher keeps it, or rank 0 must.
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
    """The world as torchrun describes it; one process where nothing does.

    Raises UsageError on descriptions that are none.
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
        _number("RANK", 0), size, _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", size),
        _number("GROUP_RANK", 0), _number("GROUP_WORLD_SIZE", 1),
        _number("TORCHELASTIC_RESTART_COUNT", 0), None, said["MASTER_ADDR"],
        _number("MASTER_PORT", 29500), said.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )  # fmt: skip


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name} is {text!r}; expected a whole number")
    return int(text)
