"""Results of an earlier profile in a folder, and which files in it a profile may overwrite."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from minillm.errors import UsageError, parameter
from minillm.profiling.page.columns import COLUMNS
from minillm.runtime.ownership import is_plain_file

RESULTS = "results.json"
BEGINNING = 2048  # bytes that are read of a file


def read(path: Path) -> dict | None:
    """Return the results {"about": ..., "suites": ..., "earlier": ...} in a file, see report.write.

    The result is None if there is no file, or if it is not minillm's.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        about, suites, earlier = found["about"], found["suites"], found.get("earlier", {})
        rows = [row for suite in suites.values() for row in suite]
        if all(isinstance(x, dict) for x in (about, earlier, *earlier.values(), *rows)):
            return found
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    return None


def refuse_foreign(folder: Path, suites: Iterable[str]) -> None:
    """Raise UsageError unless a folder is free for a profile, or has one of an earlier run.

    A file is only overwritten if the results of the earlier run list it, and it begins as such a
    file of a profile does.

    folder: the folder, which need not exist
    suites: names of the suites whose files will be written
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    found, out = read(folder / RESULTS), parameter("out")
    if found is None:
        raise UsageError(f"{out} {folder}: holds other things than a profile; name another folder")
    for name in (RESULTS, *sorted(_files(suites))):
        path = folder / name
        listed = name in {RESULTS, *_files(found["suites"])}
        if os.path.lexists(path) and not (listed and _looks_ours(path)):
            raise UsageError(
                f"{out} {folder}: holds a {name} that minillm did not write; name another folder"
            )


def _looks_ours(path: Path) -> bool:
    """Return whether a file begins as the file of a profile with this name does."""
    if not is_plain_file(path):
        return False
    with path.open("rb") as file:
        data = file.read(BEGINNING)
    if path.suffix == ".csv":
        first = COLUMNS.get(path.stem, "").partition(" ")[0]
        return data.startswith(f"{first},".encode() if first else b"")
    marks = {"index.html": b"<title>minillm profile, ", "audit.md": b"| kernel | arch | builds |"}
    return marks.get(path.name, b"") in data


def _files(suites: Iterable[str]) -> set[str]:
    """Return the names of the files that are written for these suites, without RESULTS."""
    suites = set(suites)
    return {
        "index.html",
        *(f"{name}.csv" for name in suites),
        *(["audit.md"] if "audit" in suites else []),
    }
