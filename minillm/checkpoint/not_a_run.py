"""Explain why a path that was given as a run is not one, and what to name instead."""

import json
import re
from pathlib import Path
from typing import Any

from minillm.runtime.launch import shell_command
from minillm.runtime.ownership import RUN, claims
from minillm.runtime.pickles import ENDINGS, is_pickle

STEP = re.compile(r"step-(\d{8})")
LISTED = 3  # number of runs that a message names
MAX_CONFIG = 1 << 20  # bytes: a larger config.json is not read


def foreign_config(folder: Path) -> dict[str, Any] | None:
    """Return the content of config.json if it is that of a Hugging Face folder, else None."""
    path = folder / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG:
            return None
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    foreign = isinstance(content, dict) and "sha256" not in content and "train" not in content
    return content if foreign and {"model_type", "architectures"} & content.keys() else None


def explain(path: Path) -> str:
    """Return one line that says what `path` is, and what to name instead."""
    if path.is_dir():
        return f"{path} {_explain_folder(path)}"
    if path.exists():
        return f"{path} {_explain_file(path)}"
    likely = Path("runs") / path
    hint = f"; did you mean {likely}?" if _is_run(likely) else ""
    return f"{path}: no such run{hint}"


def _explain_folder(folder: Path) -> str:
    config = foreign_config(folder)
    if config is not None and config.get("model_type") == "huginn_raven":
        return (
            "is a Hugging Face folder in the layout of huginn-0125, not a run; in Python "
            f"minillm.convert.huginn.load({str(folder)!r}, minillm.ops.EAGER) reads its model"
        )
    if config is not None:
        kind = config.get("model_type") or config.get("architectures")
        return f"is a Hugging Face folder (of {kind}), not a run; name a run that train.py has made"
    run = folder.parent if folder.name == "checkpoints" else folder.parent.parent
    step = STEP.fullmatch(folder.name)
    if _is_run(run) and (folder.name == "checkpoints" or step):
        what = f"checkpoint {int(step[1])}" if step else "the folder of checkpoints"
        flags = ("--checkpoint", int(step[1])) if step else ()
        return (
            f"is {what} of a run; name the run itself, as in: "
            f"{shell_command('sample', run, *flags)}"
        )
    if (folder / "index.json").is_file() and any(folder.glob("train-*.bin")):
        train = shell_command("train", "--data", folder)
        return f"is a prepared corpus, not a run; to train on it: {train}"
    has = (folder / "config.json").exists()
    what = "its config.json is another program's" if has else "it has no config.json"
    what = f"is not a run of minillm: {what}"
    if runs := sorted(filter(_is_run, folder.iterdir()), key=_changed, reverse=True):
        more = f" and {len(runs) - LISTED} others" if len(runs) > LISTED else ""
        what += f"; it holds runs, name one of them: {', '.join(map(str, runs[:LISTED]))}{more}"
    elif any(path.suffix in (".safetensors", *ENDINGS) for path in folder.iterdir()):
        what += "; there are weights in it, but nothing says of which model"
    return what


def _explain_file(path: Path) -> str:
    run = next((folder for folder in path.parents[:3] if _is_run(folder)), None)
    if run is not None:
        return f"is a file of a run, not a run folder; name the run itself, {run}"
    if path.suffix == ".gguf":
        return "is a GGUF file, not a run folder; minillm does not read it"
    if path.suffix == ".safetensors":
        return "is a safetensors file, not a run folder; name the folder of a run"
    if path.suffix.lower() in ENDINGS or (path.is_file() and is_pickle(path)):
        return "is a file, not a run folder; pickled checkpoints are never read"
    return "is a file, not a run folder; name the folder that train.py made"


def _is_run(folder: Path) -> bool:
    return claims(folder, RUN)


def _changed(folder: Path) -> int:
    return (folder / "config.json").stat().st_mtime_ns
