"""How this process was started: its place among the ranks, and what can be answered at once.

This is the only file that reads the environment. It imports neither torch nor anything else that
takes long.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minillm import errors
from minillm.errors import UsageError


def answer(name: str, parse: Callable[[Sequence[str]], object], argv: Sequence[str]) -> None:
    """Exit if `parse(argv)` answers the command line: with help, a version or a refusal.

    A script calls this before it imports torch, which takes seconds. It returns where there is
    work to do.
    """
    if (code := answered(name, parse, argv)) is not None:
        sys.exit(code)


def answered(
    name: str, parse: Callable[[Sequence[str]], object], argv: Sequence[str]
) -> int | None:
    """Return the exit code if `parse(argv)` has answered the command line, else None.

    name: the program's name in a refusal.
    Of several ranks none answers here: which of them prints a refusal is decided when they can
    talk to one another (ranks.first_to_say).
    """
    if "RANK" in os.environ:
        return None
    parsed = []
    code = errors.run(name, lambda words: parsed.append(parse(words)), argv)
    return None if parsed else code


@dataclass(frozen=True)
class World:
    """What the launcher says of this process and the others.

    rank, size: over all machines.    local_rank, local_size: on this machine, number `node` of
    `nodes`.    attempt: how often torchrun has restarted the job.    launch: a name of the job, see
    ranks.named.
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
        raise UsageError(
            f"WORLD_SIZE is {size}, but RANK or MASTER_ADDR is not set; start with "
            f"torchrun --nproc-per-node {size} train.py"
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
