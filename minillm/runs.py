"""A run folder: its name, its config.json and its tokenizer.

    runs/NAME/config.json, tokenizer.model|json, metrics.jsonl, samples.txt, checkpoints/

What this room does not do: read or write checkpoints (checkpoint.py).
"""

import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO

from minillm.config import ModelConfig
from minillm.errors import CorruptError, UsageError
from minillm.storage import file_digest, read_json, sync_folder, write_json
from minillm.tokenizer import Tokenizer, load_tokenizer

STEP = re.compile(r"step-(\d{8})")
ASIDE = re.compile(r"\.step-(\d{8})\.old\.tmp")
BEGUN = {"lock", "config.json.tmp"}  # all that a run without config.json may have


def newest_run(root: Path = Path("runs")) -> Path:
    """The run in `root` whose newest checkpoint is the newest. UsageError if there is none."""
    found = [(max(c.stat().st_mtime_ns for c in checkpoints_of(run).values()), run)
             for run in root.glob("*") if checkpoints_of(run)]  # fmt: skip
    if not found:
        raise UsageError(f"no run with a checkpoint in {root}/; train one with: python train.py")
    return max(found)[1]


def run_of(launch: str | None, out: str | None) -> Path | None:
    """The run with a checkpoint that torchrun's `launch` has begun: `out`, or in runs/."""
    places = [Path(out)] if out else sorted(Path("runs").glob("*"))
    return next((run for run in places if checkpoints_of(run) and _is_of(run, launch)), None)


def _is_of(run: Path, launch: str | None) -> bool:
    path = run / "config.json"
    return launch is not None and path.is_file() and read_json(path).get("launch") == launch


def lock(run: Path) -> TextIO | None:
    """A file by which nobody else may write the run until it is closed, however the process ends.

    Raises UsageError if another process holds it. Windows has no such lock: None.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = (run / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UsageError(f"{run} is being written by another process; name another") from None
    return file


def check_out(run: Path, overwrite: bool, launch: str | None = None) -> None:
    """Raise UsageError unless `run` is free: absent, empty, or a run that may be overwritten, as
    one may that `launch` itself has begun and not brought to a checkpoint.
    """
    if not run.exists():
        return
    if not run.is_dir():
        raise UsageError(f"--out {run} is a file; name a folder")
    if {path.name for path in run.iterdir()} <= BEGUN:
        return
    if not (run / "config.json").is_file():
        raise UsageError(f"--out {run} holds other things than a run; name another folder")
    if not overwrite and (checkpoints_of(run) or not _is_of(run, launch)):
        more = (
            f"go on with --resume {run}, or" if checkpoints_of(run) else "it has no checkpoint yet;"
        )
        raise UsageError(f"--out {run} exists; {more} replace it with --overwrite")


def make_run(out: str | None, name: str, overwrite: bool, launch: str | None = None) -> Path:
    """Make an empty run folder: `out`, in the place of whatever check_out lets go, or runs/name-N.

    Of two processes that ask for the same `out` one gets it, the other UsageError.
    """
    if out is None:
        return _make_next(Path("runs"), name)
    run = Path(out)
    check_out(run, overwrite, launch)
    try:
        if run.exists():
            held = lock(run)
            _empty(run)
            if held:
                held.close()
        else:
            run.mkdir(parents=True)
    except FileExistsError:
        raise UsageError(f"--out {run} was taken by another process; name another") from None
    sync_folder(run.parent)
    return run


def _empty(run: Path) -> None:
    """Delete what a run folder holds; killed on the way, it is still a run or free."""
    checkpoints, gone = run / "checkpoints", run / "checkpoints.tmp"
    if checkpoints.exists():  # half of one must not be taken for one
        shutil.rmtree(gone, ignore_errors=True)
        checkpoints.rename(gone)
    last = ("config.json", "lock")
    for path in sorted(run.iterdir(), key=lambda path: (path.name in last, path.name)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _make_next(root: Path, name: str) -> Path:
    """Make the first of root/name-1, root/name-2, ... that nobody else has."""
    n = 1
    while True:
        try:
            run = root / f"{name}-{n}"
            run.mkdir(parents=True)
            sync_folder(root)
            return run
        except FileExistsError:
            n += 1


def checkpoints_of(run: Path) -> dict[int, Path]:
    """The folders of a run's whole checkpoints, by step.

    One that is put aside to be replaced counts until the new one has the name.
    """
    folders = [f.parent for f in run.glob("checkpoints/*/manifest.json")]
    return {
        int(m[1]): f for names in (ASIDE, STEP) for f in folders if (m := names.fullmatch(f.name))
    }


def require_shared(run: Path) -> None:
    """Raise UsageError where a run that another process has begun is not seen."""
    if not (run / "config.json").is_file():
        raise UsageError(f"{run} is not seen by all ranks; name a folder that all machines share")


def newest_settings(run: Path) -> dict[str, Any]:
    """What a resumed run may change, as its newest checkpoint has it."""
    steps = checkpoints_of(require_run(run))
    return read_json(steps[max(steps)] / "state.json")["settings"] if steps else {}


def require_run(run: Path) -> Path:
    """`run`, if it is a run folder; UsageError if not."""
    if run.is_dir() and (run / "config.json").is_file():
        return run
    if run.is_dir():
        raise UsageError(f"{run} is not a run of minillm: it has no config.json")
    if run.exists():
        raise UsageError(f"{run} is a file, not a run folder; pickled checkpoints are never read")
    raise UsageError(f"{run}: no such run")


def read_config(run: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's configuration and the training settings that config.json states."""
    body = read_json(require_run(run) / "config.json")
    try:
        names = {f.name for f in fields(ModelConfig)}
        unknown = set(body["model"]) - names
        if unknown:
            raise CorruptError(f"{run}/config.json: unknown model setting {sorted(unknown)[0]!r}")
        if body["model"].get("vocab_size") is None:
            raise CorruptError(f"{run}/config.json: the model has no vocab_size")
        return ModelConfig(**body["model"]), body["train"]
    except (KeyError, TypeError, UsageError) as error:
        raise CorruptError(f"{run}/config.json: {error}") from None


def write_config(run: Path, model: ModelConfig, train: dict, facts: dict) -> None:
    """config.json: the resolved configuration and the facts of where it runs."""
    write_json(run / "config.json", {"model": asdict(model), "train": train, **facts})


def tokenizer_path(run: Path) -> Path:
    """The tokenizer's file in a run. CorruptError if it is missing or another than stated."""
    files = [p for n in ("tokenizer.model", "tokenizer.json") if (p := run / n).is_file()]
    if not files:
        raise CorruptError(f"{run}: has no tokenizer.model or tokenizer.json")
    if read_json(run / "config.json").get("tokenizer_sha256") != file_digest(files[0]):
        raise CorruptError(f"{files[0]}: is not the tokenizer that the run was trained with")
    return files[0]


def load_run_tokenizer(run: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a run. CorruptError if it does not belong."""
    path = tokenizer_path(run)
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise CorruptError(
            f"{path}: {tokenizer.vocab_size} tokens, the model knows {config.vocab_size}"
        )
    return tokenizer
