"""Pickled files, which run what they hold when they are loaded: known by name and first bytes.

What this room does not do: open one.
"""

from pathlib import Path

from minillm.errors import UsageError

ENDINGS = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib")
# torch.save writes a zip archive, or, as pickle does, the number of the protocol.
MAGIC = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins like this is a pickle, or an archive of torch.save."""
    return head.startswith(MAGIC)


def refuse_pickle(path: Path, expected: str) -> None:
    """Raise UsageError if the file at `path` is pickled, by its name or its first bytes.

    expected: what should have been given.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        pickled = path.suffix.lower() in ENDINGS or is_pickle(file.read(4))
    if pickled:
        raise UsageError(f"{path}: pickled files are never read; expected {expected}")
