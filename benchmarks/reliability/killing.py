"""Processes of train.py that are killed on the way, and what the runs that they leave hold.

A process that has imported everything, and computes nothing itself, forks each of them: one lives a
second or two, where a cold start takes ten. What it is doing it writes on a board that outlives it.
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
import torch._dynamo  # noqa: F401 - each child would import it anew

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
# Of the system, when files are written or read. A kill can come before and after each.
CALLS = {"open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir",
         "scandir"}  # fmt: skip
VOLATILE = {"step_ms", "tokens_per_s", "mfu", "peak_memory_mib", "trained_s", "cache_dir"}


class Board:
    """What a child is doing, in memory that it shares with its parent.

    begun: it has; before that, in a fork, signals are lost.    phase: a number of PHASES.
    met: it is one of its ranks.    first: the step that its loop began after; -1: it has not.
    step: the last one done.    opening, saving, pruning: CALLS that it has entered or left, before
    the loop and in saving and pruning.
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
    """A process of train.py, begun when it is made.

    log: where its standard output and error go.    die_at: it kills itself as soon as one of the
    board's numbers is so high: ("saving", 7).    place: the launcher's environment.
    slow_save_s: how long a save waits before it writes.
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
        except KeyboardInterrupt:  # at the very end; Python itself ends so
            code = 130
        finally:
            os._exit(code)

    @property
    def code(self) -> int | None:
        """How it ended, -9 if it was killed; None: it lives."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, until: float) -> int | None:
        """Until it has ended, or the clock shows `until`."""
        while self.code is None and time.monotonic() < until:
            time.sleep(0.002)
        return self.code

    def send(self, number: int) -> None:
        """A signal, if it lives."""
        if self.code is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """Make sure that it does not outlive its trial."""
        self.send(signal.SIGKILL)
        self.wait(time.monotonic() + 10)

    @property
    def said(self) -> str:
        """All that it has printed."""
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""


def _watch(
    board: Board, resumes: bool, die_at: tuple[str, int], slow_save_s: float
) -> dict[str, Callable]:
    """Have what this process does written on the board; return the parts of train.train that
    do so.
    """
    first = "resuming" if resumes else "starting"

    def marked(
        real: Callable, phase: str, counter: str = "", before: Callable[..., None] = id,
        then: str = "",
    ) -> Callable:  # fmt: skip
        """Return `real` with its phase on the board, and afterwards `then` or the phase before."""

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

    def mark(module: Any, name: str, *args: Any, **options: Any) -> None:
        """Put the marked function in the place of module.name."""
        setattr(module, name, marked(getattr(module, name), *args, **options))

    def counted(setup: Any, state: Any, *args: Any) -> Iterator[Any]:
        """Yield the steps, and write each one on the board when it is done."""
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


def place_of(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher tells a rank."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def last_step(run: Path) -> int:
    """The last step that metrics.jsonl has a whole row of; 0: none."""
    path, last = run / "metrics.jsonl", 0
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            last = max(last, json.loads(line)["step"])
        except ValueError:
            continue
    return last


def traces(run: Path) -> dict[str, Any]:
    """All that two runs must have in common: the rows as they are written but for the times, and of
    every checkpoint the bits of all tensors and the state.
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
