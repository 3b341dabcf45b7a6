"""Pickled files, which run what they hold when they are loaded: known by name and first bytes.

What this room does not do: open one.
"""

import zipfile
from pathlib import Path

from minillm.errors import UsageError

ENDINGS = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib")
# torch.save writes a zip archive, or, as pickle does, the number of the protocol.
ZIP = b"PK\x03\x04"
MAGIC = (ZIP, *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins like this is a pickle, or an archive of torch.save."""
    return head.startswith(MAGIC)


def refuse_pickle(path: Path, expected: str) -> None:
    """Raise UsageError if the file at `path` is pickled, by its name or its first bytes.

    A zip archive that torch.save did not write is refused too, as what it is.
    expected: what should have been given.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(4)
    if path.suffix.lower() not in ENDINGS and head == ZIP and not _is_of_torch(path):
        raise UsageError(f"{path}: a zip archive, not {expected}; unpack it first")
    if path.suffix.lower() in ENDINGS or is_pickle(head):
        raise UsageError(f"{path}: pickled files are never read; expected {expected}")


def _is_of_torch(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False
