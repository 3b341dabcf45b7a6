"""Write files so that they are complete or absent, and read them so that damage is noticed.

A JSON file contains a digest of its own content under "sha256".
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

from minillm.errors import CorruptError, UsageError, parameter

VERSION = 1
MAX_JSON = 64 << 20  # bytes; about the size of the index of a corpus of 1 TB
# Functions that convert the content of a version to the next: LIFTS[1](name of the file, content).
LIFTS: dict[int, Callable[[str, dict[str, Any]], dict[str, Any]]] = {}
# Names of the files of a prepared corpus. A folder left by a killed process has only such files.
BUILT = re.compile(
    r"((train|val)(-targets)?-\d{5,}\.bin|(tokenizer\.(model|json)|index\.json)(\.tmp)?)"
)
PIECE = 1 << 20  # bytes hashed and written at a time, while they are in the processor's cache


def write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a new file and wait until it is on the disk; return its "bytes" and "sha256".

    path: the file
    pieces: its content
    """
    digest, size = hashlib.sha256(), 0
    with naming(path), path.open("wb", buffering=0) as file:
        for piece in pieces:
            for start in range(0, len(piece), PIECE):
                rest = memoryview(piece)[start : start + PIECE]
                digest.update(rest)
                while rest:
                    rest = rest[file.write(rest) :]  # write may write only a part
            size += len(piece)
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_durably(path: Path, data: bytes) -> dict[str, Any]:
    """Write a file under a temporary name, rename it, and wait until both are on the disk.

    path: the file, which may exist
    data: its content
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
    """Write JSON with the format's version and a digest; return its "bytes" and "sha256".

    path: the file
    content: the content, without version and digest
    """
    content = {"version": VERSION, **content}
    body = {**content, "sha256": json_digest(content)}
    return write_durably(path, _text(body))


def _text(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, allow_nan=False) + "\n").encode("ascii")


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """Return the content that write_json wrote, converted from an older version if need be.

    path: the file
    hint: advice about damage, for the end of the message
    Raises CorruptError, which names the file, if a single byte differs, white space included, or
    if a newer version wrote the file.
    """
    hint = f"; {hint}" if hint else ""
    if not path.is_file():
        raise CorruptError(f"{path}: is missing, or not a file{hint}")
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
    # The digest is checked before the version, so that a flipped bit in the version is found.
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
    """Return the SHA-256 of the canonical JSON of some content, in hex."""
    return bytes_digest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii"))


def bytes_digest(data: bytes) -> str:
    """Return the SHA-256 of some bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of a file to an OSError; one from reading an open file does not have it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk; do nothing on Windows, which cannot."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_place(name: str, path: Path) -> None:
    """Raise UsageError or PermissionError, before the work begins, if a folder cannot be written.

    name: the parameter that names the folder, such as "cache_dir"
    path: the folder, which need not exist
    """
    places = (path.absolute(), *path.absolute().parents)
    there = next(p for p in places if p.is_symlink() or p.exists())  # a dangling link too
    if not there.is_dir():
        raise UsageError(f"{parameter(name)} {path}: {there} is not a folder; name another place")
    if not os.access(there, os.W_OK):
        raise PermissionError(errno.EACCES, "not writable; name another place", str(there))


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` when the body has ended.

    Temporary folders of earlier processes that were killed are deleted if they have only files
    that a corpus has. `folder` may exist if it is empty; otherwise the renaming raises OSError.
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
    """Return a new folder, and its lock, which shows other processes that its owner is running."""
    while True:
        temporary = parent / f"{stem}{secrets.token_hex(4)}.tmp"
        temporary.mkdir()
        try:
            held = _lock_folder(temporary)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process has just deleted it as abandoned
        if temporary.exists():
            return temporary, held
        if held is not None:
            os.close(held)


def _delete_abandoned(temporary: Path) -> None:
    """Delete a folder of `_claim` whose process has died; keep it if folders cannot be locked."""
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
    """Lock a folder; return a handle, which holds the lock until it is closed or the process ends.

    Returns None if folders cannot be locked. Raises BlockingIOError if another process locked it.
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
        return None  # a network file system without locks
    return handle
