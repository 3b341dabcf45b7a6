"""Start processes of train.py that are killed, and read the runs that they leave.

A process that has imported everything, and computes nothing itself, forks each of them. A child
takes a second or two, where a cold start takes ten. It writes its phase to a board that outlives
it.
"""

import hashlib
import json
import mmap
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch._dynamo  # noqa: F401 - otherwise each child would import it

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import minillm
from minillm.checkpoint import keep
from minillm.checkpoint.find import open_checkpoint
from minillm.checkpoint.run_folder import RunFolder
from minillm.checkpoint.write import save
from minillm.distributed.ranks import first_to_say, leave
from minillm.runtime import device as world, program
from minillm.scripts import train
from minillm.training import corpus
from minillm.training.steps import steps

for _, name, _ in pkgutil.iter_modules(minillm.__path__, "minillm."):
    if name not in ("minillm.__main__", "minillm.kernels"):
        import_module(name)

PHASES = ("starting", "preparing", "beginning", "resuming", "training", "saving", "pruning",
          "ending", "leaving")  # fmt: skip
COUNTERS = ("opening", "saving", "pruning")
SLOTS = ("begun", "phase", "met", "first", "step", *COUNTERS)
# System calls that write or read files. A kill can come before and after each.
CALLS = {"open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir",
         "scandir"}  # fmt: skip
VOLATILE = {"step_ms", "tokens_per_s", "mfu", "peak_memory_mib", "trained_s", "cache_dir"}


class Board:
    """State of a child, in memory that it shares with its parent.

    begun: 1 once it has begun; before that, in a fork, signals are lost
    phase: index in PHASES
    met: 1 once it is connected to its launch
    first: step after which its loop began; -1: it has not begun
    step: last step that it has done
    opening, saving, pruning: number of CALLS that it has entered or left, before the loop, in
        saving and in pruning
    """

    def __init__(self) -> None:
        self._slots = memoryview(mmap.mmap(-1, 8 * len(SLOTS))).cast("q")
        self.first = -1

    def __getattr__(self, name: str) -> int:
        return self._slots[SLOTS.index(name)]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SLOTS:
            self._slots[SLOTS.index(name)] = value
        else:
            super().__setattr__(name, value)

    @property
    def doing(self) -> str:
        """The name of the phase."""
        return PHASES[self.phase]


class Child:
    """A process of train.py, which starts when the object is made.

    argv: arguments of train.py
    log: file of its standard output and error
    die_at: counter of the board, and the value at which the process kills itself: ("saving", 7)
    place: environment variables of the launcher
    slow_save_s: seconds that a save waits before it writes
    """

    def __init__(
        self, argv: list[str], log: Path, die_at: tuple[str, int] = ("", 0),
        place: dict[str, str] | None = None, slow_save_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.board, self.log, self.start = Board(), log, time.monotonic()
        self._code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.environ.update(place or {})
            replaced = _watch(self.board, "--resume" in argv, die_at, slow_save_s)
            main = partial(train.main, **replaced)
            code = leave(program.run("train.py", main, argv, first_to_say))
        except KeyboardInterrupt:  # raised at the very end; Python ends with this code too
            code = 130
        finally:
            os._exit(code)

    @property
    def code(self) -> int | None:
        """The exit code of the process, -9 if it was killed; None: it is still running."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, until: float) -> int | None:
        """Wait until the process has ended or the clock shows `until`; return its exit code."""
        while self.code is None and time.monotonic() < until:
            time.sleep(0.002)
        return self.code

    def send(self, number: int) -> None:
        """Send a signal to the process if it is still running."""
        if self.code is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """Kill the process, so that it does not outlive its trial."""
        self.send(signal.SIGKILL)
        self.wait(time.monotonic() + 10)

    @property
    def said(self) -> str:
        """The text that the process has printed so far."""
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""


def _watch(
    board: Board, resumes: bool, die_at: tuple[str, int], slow_save_s: float
) -> dict[str, Callable]:
    """Make this process write its phase to the board; return replaced arguments of train.main."""
    first = "resuming" if resumes else "starting"
    marked = partial(_marked, board, die_at)

    def mark(module: Any, name: str, *args: Any, **options: Any) -> None:
        """Replace module.name by the marked function."""
        setattr(module, name, marked(getattr(module, name), *args, **options))

    def counted(setup: Any, state: Any, *args: Any) -> Iterator[Any]:
        """Yield the steps, and write each one to the board when it is done."""
        board.first = board.step = state.progress.step
        board.phase = PHASES.index("training")
        for result in steps(setup, state, *args):
            yield result
            board.step = state.progress.step

    def met(settings: Any) -> None:
        board.met = 1

    world.measured_peak_flops = lambda device, dtype: 1e10  # timed for 0.2 s, for a column
    board.phase = PHASES.index(first)
    mark(train, "train", first, before=met, then="leaving")
    mark(train, "build", first, "opening")
    mark(corpus, "prepare", "preparing", "opening")
    mark(train, "begin_run", "beginning", "opening")
    mark(train, "take_up", "resuming", "opening")
    mark(keep, "prune", "pruning", "pruning")
    mark(train, "_finish", "ending", then="leaving")
    write = marked(save, "saving", "saving", lambda run: time.sleep(slow_save_s))
    board.begun = 1
    return {"steps": counted, "write": write}


def _marked(
    board: Board, die_at: tuple[str, int], real: Callable, phase: str, counter: str = "",
    before: Callable[..., None] = id, then: str = "",
) -> Callable:  # fmt: skip
    """Return `real` such that it sets its phase, and afterwards `then` or the phase before.

    With a counter it counts its CALLS, and kills the process at the one that `die_at` names.
    """

    def count(frame: FrameType, event: str, about: Any) -> None:
        if event in ("c_call", "c_return") and about.__name__ in CALLS:
            now = getattr(board, counter) + 1
            setattr(board, counter, now)
            if (counter, now) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def work(*args: Any, **options: Any) -> Any:
        past, counting = board.phase, sys.getprofile()
        board.phase = PHASES.index(phase)
        before(args[0])
        sys.setprofile(count if counter else None)
        try:
            return real(*args, **options)
        finally:
            sys.setprofile(counting)
            board.phase = PHASES.index(then) if then else past

    return work


def place_of(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the environment variables that a launcher sets for a rank.

    rank, size: the rank and the number of ranks
    port: port of the launcher on this machine
    """
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def last_step(run: Path) -> int:
    """Return the last step with a whole row in metrics.jsonl; 0: there is none."""
    path, last = run / "metrics.jsonl", 0
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            last = max(last, json.loads(line)["step"])
        except ValueError:
            continue
    return last


def traces(run: Path) -> dict[str, Any]:
    """Return everything that two runs must have in common.

    This is the rows of metrics.jsonl without times and, for every checkpoint, the state and a
    digest of the bits of all tensors.
    """
    rows = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line, parse_float=str)
        rows.append({name: x for name, x in row.items() if name not in VOLATILE})
    found: dict[str, Any] = {"metrics.jsonl": rows}
    for step in RunFolder(run).checkpoints():
        past = open_checkpoint(run, str(step))
        found[f"state of step {step}"] = {
            name: {k: v for k, v in x.items() if k not in VOLATILE} if isinstance(x, dict) else x
            for name, x in past.state.items()
        }
        for kind in past.kinds:
            digest = hashlib.sha256()
            for key, t in sorted(past.tensors(kind).items()):
                bits = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                digest.update(repr((key, t.dtype, t.shape)).encode() + bits)
            found[f"{kind} of step {step}"] = digest.hexdigest()
    return found
