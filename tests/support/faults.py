"""System calls that fail, or at which the process dies, at will.

Calls are met where Python makes them: the functions of `os`, and files by way of io.open, whose raw
writes are seen one by one. Only calls on paths under one folder count. test_write_faults.py holds
this against strace: no call that changes anything is missed.
"""

import builtins
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from minillm.errors import MinillmError

GROWS = {"create", "write", "mkdir", "rename", "fsync"}  # what a full disk refuses
CHANGES = GROWS | {"unlink", "rmdir", "truncate"}
NAMES = {
    "mkdir": "mkdir", "rename": "rename", "replace": "rename", "unlink": "unlink",
    "remove": "unlink", "rmdir": "rmdir", "truncate": "truncate", "scandir": "look",
    "listdir": "look", "stat": "look", "lstat": "look", "statvfs": "look", "fsync": "fsync",
    "close": "close",
}  # fmt: skip
# Which calls each kind of fault can befall; None: all.
KINDS = {
    "kill before": None,
    "kill after": None,
    "power cut": CHANGES,  # after it; what was not synced is lost
    "torn write": {"write"},  # half of it, then death
    "short write": {"write"},  # half of it, and no error
    "ENOSPC": GROWS,
    "EIO": None,
    "stays full": GROWS,
}
DEADLY = {"kill before", "kill after", "power cut", "torn write"}


class Faults:
    """Counts the calls made on what lies in `root`; at number `at` (from 0) does fault `kind`."""

    def __init__(self, root: Path, at: int | None = None, kind: str = "") -> None:
        self.root, self.at, self.kind = str(root), at, kind
        self.calls: list[tuple[str, str]] = []  # (name, path or nothing)
        self.paths: dict[int, str] = {}  # of open handles
        self.synced: dict[int, tuple[int, int]] = {}  # inode -> (a handle of ours, bytes synced)

    def call(self, name: str, path: str, real: Callable[[], Any]) -> Any:
        """real(), or the fault that is due."""
        number, kind = len(self.calls), self.kind
        self.calls.append((name, path))
        due = self.at is not None and number == self.at
        later = self.at is not None and number > self.at
        if (due or later) and kind == "stays full" and name in GROWS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if not due:
            return real()
        if kind == "kill before":
            self.die()
        if kind in ("ENOSPC", "EIO"):
            if name == "close":
                real()
            code = getattr(errno, kind)
            raise OSError(code, os.strerror(code), path)
        try:
            return real()
        finally:  # it may also fail of itself: to look at what is not there
            if kind == "power cut":
                for handle, size in self.synced.values():
                    os.ftruncate(handle, size)
            self.die()

    def die(self) -> None:
        """End as by kill -9."""
        os.kill(os.getpid(), signal.SIGKILL)

    def inside(self, path: Any, options: dict) -> str | None:
        """The path of what a call is about, if it counts."""
        if isinstance(path, int):
            return self.paths.get(path)
        if (folder := options.get("dir_fd")) is not None:
            return f"{self.paths[folder]}/{path}" if folder in self.paths else None
        path = str(Path(os.fsdecode(path)).absolute())
        return path if path.startswith(self.root) else None

    def patched(self, name: str) -> Callable[..., Any]:
        """The function os.NAME, met."""
        real = getattr(os, name)

        def met(path: Any, *rest: Any, **options: Any) -> Any:
            found = self.inside(path, options)
            if found is None:
                return real(path, *rest, **options)
            work = self.sync if name == "fsync" else real  # a real one waits for the disk
            result = self.call(NAMES[name], found, lambda: work(path, *rest, **options))
            if name == "close":
                self.paths.pop(path, None)
            return result

        return met

    def sync(self, handle: int) -> None:
        """Note that what was written so far would outlive a power cut."""
        about = os.fstat(handle)
        if about.st_ino in self.synced:
            self.synced[about.st_ino] = (self.synced[about.st_ino][0], about.st_size)

    def note(self, handle: int) -> None:
        """A file is open for writing."""
        about = os.fstat(handle)
        self.synced.setdefault(about.st_ino, (os.dup(handle), about.st_size))

    def open_handle(self, path: Any, *rest: Any, **options: Any) -> int:
        """os.open, which here opens folders only."""
        real, found = self.real_open, self.inside(path, options)
        if found is None:
            return real(path, *rest, **options)
        handle = self.call("look", found, lambda: real(path, *rest, **options))
        self.paths[handle] = found
        return handle

    def open_file(
        self, file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None,
        errors: Any = None, newline: Any = None, *more: Any, **options: Any,
    ) -> Any:  # fmt: skip
        """io.open, with raw files whose calls are met."""
        found = None if isinstance(file, int) else self.inside(file, {})
        if found is None:
            return self.real_file(file, mode, buffering, encoding, errors, newline, *more)
        raw = RawFile(self, found, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedWriter(raw) if raw.writable() else io.BufferedReader(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    @contextmanager
    def at_work(self) -> Iterator["Faults"]:
        """Inside the `with` calls are met."""
        self.real_open, self.real_file = os.open, io.open
        met = {name: self.patched(name) for name in NAMES} | {"open": self.open_handle}
        with (
            mock.patch.multiple(os, **met),
            mock.patch.object(io, "open", self.open_file),
            mock.patch.object(builtins, "open", self.open_file),
        ):
            yield self


class RawFile(io.FileIO):
    """A file without a buffer, each call of which is met."""

    def __init__(self, faults: Faults, path: str, mode: str) -> None:
        self.faults, self.path = faults, path
        name = "look" if mode == "r" else "create"
        faults.call(name, path, lambda: super(RawFile, self).__init__(path, mode))
        faults.paths[self.fileno()] = path
        if self.writable():
            faults.note(self.fileno())

    def write(self, data: Any) -> int:
        """As FileIO; half of it where that is the fault."""
        faults, view = self.faults, memoryview(data).cast("B")
        if len(faults.calls) == faults.at and faults.kind in ("torn write", "short write"):
            half = super().write(view[: max(1, len(view) // 2)])
            if faults.kind == "torn write":
                faults.die()
            faults.calls.append(("write", self.path))
            return half
        return faults.call("write", self.path, lambda: super(RawFile, self).write(view))

    def truncate(self, size: int | None = None) -> int:
        """As FileIO."""
        return self.faults.call("truncate", self.path, lambda: super(RawFile, self).truncate(size))

    def close(self) -> None:
        """As FileIO."""
        if not self.closed:
            self.faults.paths.pop(self.fileno(), None)
            self.faults.call("close", self.path, super().close)


def calls_of(root: Path, work: Callable[[], Any]) -> list[tuple[str, str]]:
    """(name, path) of each call of work(), which is done undisturbed."""
    with Faults(root).at_work() as faults:
        work()
    return faults.calls


def points(calls: list[tuple[str, str]]) -> list[tuple[int, str]]:
    """(number of the call, kind of fault) for every fault that can befall it."""
    return [
        (at, kind)
        for kind, befalls in KINDS.items()
        for at, (name, _) in enumerate(calls)
        if befalls is None or name in befalls
    ]


def attempt(root: Path, work: Callable[[], Any], at: int, kind: str) -> str:
    """work() in a child with one fault: "killed", "failed" (an error of ours) or "done"."""
    child = os.fork()
    if child == 0:
        code = 9
        try:
            with Faults(root, at, kind).at_work():
                work()
            code = 0
        except (OSError, MinillmError):
            code = 5
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    outcome = {0: "done", 5: "failed", -signal.SIGKILL: "killed"}.get(
        os.waitstatus_to_exitcode(status), f"status {status}"
    )
    expected = {"killed"} if kind in DEADLY else {"done", "failed"}
    assert outcome in expected, f"{kind} at call {at}: {outcome}"
    return outcome
