"""Processes of train.py that can be killed at chosen moments, and the contents of their runs.

A process that has imported everything, and computes nothing itself, forks each of them. So a child
lives a second or two, while a cold start takes ten. A child writes what it is doing to a board in
shared memory, which exists after its death.
"""

import hashlib
import json
import mmap
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch._dynamo  # noqa: F401 - each child would import it anew

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import minillm
from minillm.checkpoint import write
from minillm.checkpoint.find import open_checkpoint
from minillm.checkpoint.run_folder import RunFolder
from minillm.distributed.ranks import first_to_say, leave
from minillm.runtime import device, program
from minillm.scripts import train
from minillm.training import setup as startup, state as training

for _, name, _ in pkgutil.iter_modules(minillm.__path__, "minillm."):
    if name not in ("minillm.__main__", "minillm.kernels"):
        import_module(name)

PHASES = ("starting", "preparing", "beginning", "resuming", "training", "saving", "pruning",
          "ending", "leaving")  # fmt: skip
COUNTERS = ("opening", "saving", "pruning")
SLOTS = ("begun", "phase", "met", "first", "step", *COUNTERS)
# Of the system, when files are written or read. A kill can come before and after each.
CALLS = {"open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir",
         "scandir"}  # fmt: skip
VOLATILE = {"step_ms", "tokens_per_s", "mfu", "peak_memory_mib", "trained_s", "cache_dir"}


class Board:
    """State of a child, in memory that it shares with its parent.

    begun: 1 once the child has started; before that, in a fork, signals are lost
    phase: index into PHASES
    met: 1 once the child has connected to the other ranks
    first: step after which its loop began; -1 before that
    step: last finished step
    opening: number of CALLS entered or left before the loop
    saving: number of CALLS entered or left while saving
    pruning: number of CALLS entered or left while pruning
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
        """Name of the phase."""
        return PHASES[self.phase]


class Child:
    """A process of train.py, which starts when the object is created.

    log: file for its standard output and error
    die_at: it kills itself as soon as a number of the board has this value: ("saving", 7)
    place: the launcher's environment variables
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
            _watch(self.board, "--resume" in argv, die_at, slow_save_s)
            code = leave(program.run("train.py", train.main, argv, first_to_say))
        except KeyboardInterrupt:  # at the very end; Python itself ends so
            code = 130
        finally:
            os._exit(code)

    @property
    def code(self) -> int | None:
        """Exit code, -9 if the process was killed, None if it is running."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, until: float) -> int | None:
        """Wait until the process has ended, or the clock shows `until`."""
        while self.code is None and time.monotonic() < until:
            time.sleep(0.002)
        return self.code

    def send(self, number: int) -> None:
        """Send a signal, if the process is running."""
        if self.code is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """Make sure that the process has ended."""
        self.send(signal.SIGKILL)
        self.wait(time.monotonic() + 10)

    @property
    def said(self) -> str:
        """Everything that the process has printed."""
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""


def _watch(board: Board, resumes: bool, die_at: tuple[str, int], slow_save_s: float) -> None:
    """Make this process write what it does to the board."""
    first = "resuming" if resumes else "starting"

    def mark(
        room: Any, name: str, phase: str, counter: str = "", before: Callable[..., None] = id,
        then: str = "",
    ) -> None:  # fmt: skip
        """Wrap a function so that its calls are in a phase, with `then` or the old one after it."""
        real = getattr(room, name)

        def count(frame: FrameType, event: str, about: Any) -> None:
            if event in ("c_call", "c_return") and about.__name__ in CALLS:
                now = getattr(board, counter) + 1
                setattr(board, counter, now)
                if (counter, now) == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        def marked(*args: Any, **options: Any) -> Any:
            past, counting = board.phase, sys.getprofile()
            board.phase = PHASES.index(phase)
            before(args[0])
            sys.setprofile(count if counter else None)
            try:
                return real(*args, **options)
            finally:
                sys.setprofile(counting)
                board.phase = PHASES.index(then) if then else past

        setattr(room, name, marked)

    def begun(t: training.Training) -> None:
        board.first = board.step = t.progress.step

    def done(t: training.Training) -> None:
        board.step = t.progress.step

    def met(settings: Any) -> None:
        board.met = 1

    device.measured_peak_flops = lambda device, dtype: 1e10  # timed for 0.2 s, for a column
    board.phase = PHASES.index(first)
    mark(train, "train", first, before=met, then="leaving")
    mark(train, "set_up", first, "opening")
    mark(startup, "prepare", "preparing", "opening")
    mark(train, "begin_run", "beginning", "opening")
    mark(write, "take_up", "resuming", "opening")
    mark(train, "learn", "training", before=begun)
    mark(train, "heed", "training", before=done)
    mark(write, "save", "saving", "saving", lambda run: time.sleep(slow_save_s))
    mark(write, "prune", "pruning", "pruning")
    mark(train, "finish", "ending", then="leaving")
    board.begun = 1


def place_of(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the environment variables that a launcher gives to a rank.

    rank: number of the rank
    size: number of ranks
    port: port of the store
    """
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def last_step(run: Path) -> int:
    """Return the last step of which metrics.jsonl has a complete row, or 0."""
    path, last = run / "metrics.jsonl", 0
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            last = max(last, json.loads(line)["step"])
        except ValueError:
            continue
    return last


def traces(run: Path) -> dict[str, Any]:
    """Return all that two runs must have in common.

    That is the rows of metrics.jsonl without the times, and of every checkpoint the bits of all
    tensors and the state.
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
