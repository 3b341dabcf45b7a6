"""Files that are whole or absent, and that show when they are damaged.

JSON carries a digest of itself under "sha256"; a bit that flips is seen when it is read.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minillm.errors import CorruptError, UsageError

VERSION = 1
MAX_JSON = 64 << 20  # bytes; the index of a corpus of 1 TB has about as many
# What lifts the content of a version to the next one: LIFTS[1](name of the file, content).
LIFTS: dict[int, Callable[[str, dict[str, Any]], dict[str, Any]]] = {}
# The files of a prepared corpus, by whose names a folder that a killed process left is known.
BUILT = re.compile(
    r"((train|val)(-targets)?-\d{5,}\.bin|(tokenizer\.(model|json)|index\.json)(\.tmp)?)"
)
PIECE = 1 << 20  # bytes hashed and written at a time: they are still in the cache


def write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a new file and wait until it is on the disk; returns its "bytes" and "sha256"."""
    digest, size = hashlib.sha256(), 0
    with naming(path), path.open("wb", buffering=0) as file:
        for piece in pieces:
            for start in range(0, len(piece), PIECE):
                rest = memoryview(piece)[start : start + PIECE]
                digest.update(rest)
                while rest:
                    rest = rest[file.write(rest) :]  # which may write less than it is given
            size += len(piece)
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_durably(path: Path, data: bytes) -> dict[str, Any]:
    """Write a file by way of a temporary name, and wait until it is on the disk under its own.

    Returns its "bytes" and "sha256".
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        written = write_whole(temporary, [data])
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)
    return written


def write_json(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write `content`, the format's version and the digest of both; returns as write_durably."""
    content = {"version": VERSION, **content}
    body = {**content, "sha256": json_digest(content)}
    return write_durably(path, _text(body))


def _text(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, allow_nan=False) + "\n").encode("ascii")


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """What write_json wrote, without the digest; of an older version lifted to this one.

    Raises CorruptError, naming the file and ending with `hint`, if it is that no more (not one byte
    may differ, white space included), or if a newer version wrote it.
    """
    hint = f"; {hint}" if hint else ""
    if not path.is_file():
        raise CorruptError(f"{path}: is missing, or no file{hint}")
    if path.stat().st_size > MAX_JSON:
        raise CorruptError(f"{path}: larger than {MAX_JSON >> 20} MiB{hint}")
    try:
        with naming(path):
            raw = path.read_bytes()
        content = json.loads(raw)
        ours = raw == _text(content)
        stated = content.pop("sha256")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise CorruptError(f"{path}: damaged, not the JSON that minillm writes{hint}") from None
    # The digest is that of every version, so that a bit that flips in its number is seen as such.
    if not ours or stated != json_digest(content):
        raise CorruptError(f"{path}: damaged, its content does not match its own sha256{hint}")
    version = content.get("version")
    if type(version) is int and version > VERSION:
        raise CorruptError(
            f"{path}: has format version {version}, which a newer minillm wrote; this one reads "
            f"up to {VERSION}: upgrade minillm"
        )
    while version != VERSION:
        if type(version) is not int or version not in LIFTS:
            raise CorruptError(f"{path}: has format version {version!r}, expected {VERSION}{hint}")
        content, version = LIFTS[version](path.name, content), version + 1
        content["version"] = version
    return content


def json_digest(content: dict[str, Any]) -> str:
    """SHA-256, in hex, of the canonical JSON of `content`."""
    return bytes_digest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii"))


def bytes_digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside the `with` names the file; one of reading an open file would not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk, where the system can (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_place(flag: str, path: Path) -> None:
    """Raise before the work, not after it, if nothing can be written to `path`."""
    places = (path.absolute(), *path.absolute().parents)
    there = next(p for p in places if p.is_symlink() or p.exists())  # a link to nowhere is there
    if not there.is_dir():
        raise UsageError(f"{flag} {path}: {there} is not a folder; name another place")
    if not os.access(there, os.W_OK):
        raise PermissionError(errno.EACCES, f"not writable; give another {flag}", str(there))


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its name in one step once the body is through.

    What earlier builders of the same folder left when they were killed is deleted, if it holds
    nothing but files that they make. `folder` may be there if it is empty; OSError if it is not by
    then.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{folder.name[:64]}."
    for path in folder.parent.iterdir():
        if re.fullmatch(re.escape(stem) + r"[0-9a-f]{8}\.tmp", path.name):
            _delete_abandoned(path)
    temporary, held = _claim(folder.parent, stem)
    try:
        yield temporary
        sync_folder(temporary)
        if folder.is_dir():
            folder.rmdir()
        temporary.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if held is not None:
            os.close(held)


def _claim(parent: Path, stem: str) -> tuple[Path, int | None]:
    """A new folder and the lock by which others see that its builder lives."""
    while True:
        temporary = parent / f"{stem}{secrets.token_hex(4)}.tmp"
        temporary.mkdir()
        try:
            held = _lock_folder(temporary)
        except (BlockingIOError, FileNotFoundError):
            continue  # between the two lines another builder has taken it for abandoned
        if temporary.exists():
            return temporary, held
        if held is not None:
            os.close(held)


def _delete_abandoned(temporary: Path) -> None:
    """Delete a folder of `_claim` whose builder lives no more; where no lock tells, it stays."""
    try:
        held = _lock_folder(temporary)
    except OSError:
        return
    if held is not None:
        made = list(temporary.iterdir())
        if all(BUILT.fullmatch(p.name) and p.is_file() and not p.is_symlink() for p in made):
            shutil.rmtree(temporary, ignore_errors=True)
        os.close(held)


def _lock_folder(folder: Path) -> int | None:
    """Lock a folder for as long as the handle that is returned is open, however the process ends.

    Raises BlockingIOError if another process has it. None where folders cannot be locked.
    """
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None  # a network's file system that has no locks
    return handle
