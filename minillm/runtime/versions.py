"""Report the versions of minillm, Python, torch and triton, for records of runs."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from minillm import __version__

ROOT = Path(__file__).resolve().parents[2]


def versions() -> dict[str, str | None]:
    """Return the versions of minillm, python, torch and triton; None for a missing package."""
    found = {"minillm": __version__, "python": platform.python_version()}
    return found | {package: _version(package) for package in ("torch", "triton")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit(mark_changes: bool = False) -> str | None:
    """Return the commit of minillm's own checkout, or None outside of one.

    mark_changes: add "+" where files differ from the commit.
    """
    if not (ROOT / ".git").exists():
        return None
    said = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])[: 1 + mark_changes]:
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *words],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        said.append(done.stdout.strip())
    return said[0] + ("+" if any(said[1:]) else "") or None
