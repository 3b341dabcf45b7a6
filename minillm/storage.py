"""Files that are whole or absent, and that show when they are damaged.

JSON carries a digest of itself under "sha256"; a bit that flips is seen when it is read.
"""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from minillm.errors import CorruptError, UsageError

VERSION = 1


def write_durably(path: Path, data: bytes) -> None:
    """Write a file by way of a temporary name, and wait until it is on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, the format's version and the digest of both."""
    content = {"version": VERSION, **content}
    body = {**content, "sha256": json_digest(content)}
    write_durably(path, (json.dumps(body, indent=1, allow_nan=False) + "\n").encode("ascii"))


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """What write_json wrote, without the digest.

    Raises CorruptError, naming the file and ending with `hint`, if it is that no more.
    """
    hint = f"; {hint}" if hint else ""
    try:
        content = json.loads(path.read_bytes())
        stated = content.pop("sha256")
    except FileNotFoundError:
        raise CorruptError(f"{path}: is missing{hint}") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise CorruptError(f"{path}: damaged, not the JSON that minillm writes{hint}") from None
    if content.get("version") != VERSION:
        found = content.get("version")
        raise CorruptError(f"{path}: has format version {found!r}, expected {VERSION}{hint}")
    if stated != json_digest(content):
        raise CorruptError(f"{path}: damaged, its content does not match its own sha256{hint}")
    return content


def json_digest(content: dict[str, Any]) -> str:
    """SHA-256, in hex, of the canonical JSON of `content`."""
    return bytes_digest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii"))


def bytes_digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


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
