"""Collect the facts about a measurement: the device, the versions and the command."""

import datetime
import re
import shlex
import subprocess
from collections.abc import Sequence

import torch

from minillm.runtime import ceilings
from minillm.runtime.versions import commit, versions


def about(device: torch.device, argv: Sequence[str]) -> dict:
    """Return the facts by which a figure can be judged: device, versions, commit, date and command.

    device: device that is measured
    argv: arguments of the command
    """
    return {
        "device": ceilings.name(device),
        "driver": _driver(device),
        **versions(),
        "commit": commit(mark_changes=True),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(("python", "-m", "minillm", "profile", *argv)),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def folder_name(device: torch.device) -> str:
    """Return the default name of a folder of results, such as nvidia-h200-2026-11-21."""
    words = re.sub(r"[^a-z0-9]+", "-", ceilings.name(device).lower()).strip("-")
    return f"{words}-{datetime.date.today().isoformat()}"


def _driver(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, encoding="utf-8", errors="replace", timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.split() or [None])[0]
