"""Checkpoints made to hold what they should not, their digests being right or wrong."""

from pathlib import Path
from typing import Any

from minillm.runtime.files import file_digest, read_json, write_json


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    """A file loses its last bytes."""
    path.write_bytes(path.read_bytes()[:-9])


def reseal(folder: Path) -> None:
    """Make the manifest agree with what the files of a checkpoint are now."""
    names = [p for p in sorted(folder.iterdir()) if p.name != "manifest.json"]
    files = {p.name: {"bytes": p.stat().st_size, "sha256": file_digest(p)} for p in names}
    write_json(folder / "manifest.json", {"files": files})


def rewrite(path: Path, changes: dict[str, Any]) -> None:
    """Change fields of a JSON file, "progress.step" within "progress"; its digest is right again.

    A value of ... takes the field away.
    """
    content = read_json(path)
    for name, value in changes.items():
        holder, (*outer, key) = content, name.split(".")
        for step in outer:
            holder = holder[step]
        if value is ...:
            del holder[key]
        else:
            holder[key] = value
    write_json(path, content)
