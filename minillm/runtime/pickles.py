"""Recognise pickled files, which can run code when they are loaded, by name and by content.

A pickle is recognised by only two or four bytes. So a file with a more specific structure is not
taken for a pickle: safetensors, or a zip archive without a pickle in it. No pickle is opened here.
"""

import zipfile
from pathlib import Path

from minillm.errors import UsageError

ENDINGS = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib")
ZIP = b"PK\x03\x04"  # torch.save writes a zip archive
PROTOCOLS = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
HEAD = 9  # bytes that is_safetensors looks at


def is_safetensors(head: bytes, size: int) -> bool:
    """Return whether a file has the structure of safetensors.

    That is the length of a header which is within the file, and then the header's first byte.

    head: the first HEAD bytes of the file
    size: bytes of the whole file
    """
    return 0 < int.from_bytes(head[:8], "little") <= size - 8 and head[8:HEAD] == b"{"


def is_pickle(path: Path) -> bool:
    """Return whether a file's content is a pickle, or an archive of torch.save."""
    head = _head(path)
    if is_safetensors(head, path.stat().st_size):
        return False
    return head.startswith(PROTOCOLS) or (head.startswith(ZIP) and _holds_pickle(path))


def refuse_pickle(path: Path, expected: str) -> None:
    """Raise UsageError if a file is pickled, by its name or its content.

    A zip archive that torch.save did not write is refused as a zip archive.

    path: the file
    expected: words for a file that would be accepted
    """
    if not path.is_file():
        return
    if path.suffix.lower() in ENDINGS or is_pickle(path):
        raise UsageError(f"{path}: pickled files are never read; expected {expected}")
    if _head(path).startswith(ZIP):
        raise UsageError(f"{path}: a zip archive, not {expected}; unpack it first")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def _holds_pickle(archive: Path) -> bool:
    """Return whether a zip archive has a pickle among its files."""
    try:
        with zipfile.ZipFile(archive) as file:
            return any(name.endswith(".pkl") for name in file.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        # The list of files at the end of the archive is damaged. The first name follows ZIP.
        with archive.open("rb") as file:
            return b"data.pkl" in file.read(1024)
