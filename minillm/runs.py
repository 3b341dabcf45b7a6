"""A run folder: its name, its config.json and its tokenizer.

    runs/NAME/config.json, tokenizer.model|json, metrics.jsonl, samples.txt, checkpoints/

What this room does not do: read or write checkpoints (checkpoint.py).
"""

import os
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO

from minillm import not_a_run
from minillm.config import ModelConfig
from minillm.errors import CorruptError, UsageError
from minillm.launch import shell_command
from minillm.reading import read_state
from minillm.storage import file_digest, read_json, sync_folder, write_json
from minillm.tokenizer import Tokenizer, load_tokenizer

STEP = re.compile(r"step-(\d{8})")
ASIDE = re.compile(r"\.step-(\d{8})\.old\.tmp")
# All that a run without config.json may have: it was killed before its first step.
BEGUN = {"lock", *(name + end for name in ("config.json", "tokenizer.model", "tokenizer.json")
                   for end in ("", ".tmp"))} - {"config.json"}  # fmt: skip


def newest_run(root: Path = Path("runs"), begun: bool = False) -> Path:
    """The run in `root` whose newest checkpoint is the newest; begun: those that have none count
    from their start. UsageError if there is none.
    """
    found = []
    for run in root.glob("*"):
        signs = [*checkpoints_of(run).values(), *(run.glob("config.json") if begun else ())]
        if signs:
            found.append((max(path.stat().st_mtime_ns for path in signs), run))
    if not found:
        raise UsageError(
            f"no run with a checkpoint in {root}/; train one with: {shell_command('train')}"
        )
    return max(found)[1]


def run_of(launch: str | None, out: str | None) -> Path | None:
    """The run with a checkpoint that torchrun's `launch` has begun: `out`, or in runs/."""
    places = [Path(out)] if out else sorted(Path("runs").glob("*"))
    return next((run for run in places if checkpoints_of(run) and _is_of(run, launch)), None)


def _is_of(run: Path, launch: str | None) -> bool:
    path = run / "config.json"
    if launch is None or not path.is_file():
        return False
    try:
        return read_json(path).get("launch") == launch
    except CorruptError:  # one of many runs, perhaps: it is not for this launch to mind
        return False


def lock(run: Path) -> TextIO | None:
    """A file by which nobody else may write the run until it is closed, however the process ends.

    Raises UsageError if another process holds it. Windows has no such lock: None.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = (run / "lock").open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        by = _holder(file)
        file.close()
        raise UsageError(f"{run} is being written by {by}; wait, or name another") from None
    return file


def _holder(file: TextIO) -> str:
    """Who has locked a file, as far as the system says."""
    inode, table = os.fstat(file.fileno()).st_ino, Path("/proc/locks")
    for line in table.read_text(encoding="utf-8").splitlines() if table.is_file() else ():
        words = line.split()
        if words[1] == "FLOCK" and words[5].endswith(f":{inode}") and int(words[4]) > 0:
            return f"process {words[4]}"
    return "another process"


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
        raise UsageError(
            f"--out {run} exists; continue it with {shell_command('train', '--resume', run)}, or "
            "replace it with --overwrite"
        )


def make_run(
    out: str | None, name: str, overwrite: bool, launch: str | None = None
) -> tuple[Path, TextIO | None]:
    """Make an empty run folder and lock it: `out`, in the place of whatever check_out lets go, or
    runs/name-N.

    Of two processes that ask for the same `out` one gets it, the other UsageError.
    """
    if out is None:
        run = _make_next(Path("runs"), name)
        return run, lock(run)
    run = Path(out)
    check_out(run, overwrite, launch)
    run.mkdir(parents=True, exist_ok=True)
    sync_folder(run.parent)
    held = lock(run)
    try:
        check_out(run, overwrite, launch)  # now that nobody else can write it
        _empty(run)
    except BaseException:
        if held:
            held.close()
        raise
    return run, held


def _empty(run: Path) -> None:
    """Delete what a run folder holds; killed on the way, it is still a run or free."""
    checkpoints, gone = run / "checkpoints", run / "checkpoints.tmp"
    if checkpoints.exists():  # half of one must not be taken for one
        shutil.rmtree(gone, ignore_errors=True)
        checkpoints.rename(gone)
    there = (path for path in run.iterdir() if path.name != "lock")
    for path in sorted(there, key=lambda path: (path.name == "config.json", path.name)):
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
    """The folders of a run's whole checkpoints, by step."""
    return {step: f for step, f in step_folders(run).items() if (f / "manifest.json").exists()}


def step_folders(run: Path) -> dict[int, Path]:
    """The folders that were a run's checkpoints, by step, whatever has become of them.

    One that is put aside to be replaced counts until the new one has the name.
    """
    folders = [f for f in run.glob("checkpoints/*") if f.is_dir()]
    return {
        int(m[1]): f for names in (ASIDE, STEP) for f in folders if (m := names.fullmatch(f.name))
    }


def folder_of(run: Path, step: int) -> Path:
    """The folder of the checkpoint of one step, as it is or as it will be."""
    return step_folders(run).get(step, run / "checkpoints" / f"step-{step:08d}")


def require_shared(run: Path) -> None:
    """Raise UsageError where a run that another process has begun is not seen."""
    if not (run / "config.json").is_file():
        raise UsageError(f"{run} is not seen by all ranks; name a folder that all machines share")


def newest_settings(run: Path) -> dict[str, Any]:
    """What a resumed run may change, as the newest checkpoint has it whose state can be read."""
    for _, folder in sorted(step_folders(require_run(run)).items(), reverse=True):
        try:
            return read_state(folder).get("settings", {})
        except CorruptError:
            continue  # whoever opens the checkpoint says so
    return {}


def require_run(run: Path) -> Path:
    """`run`, if it is a run folder; UsageError if not."""
    if run.is_dir() and (run / "config.json").is_file() and not_a_run.foreign_config(run) is None:
        return run
    raise UsageError(not_a_run.about(run))


def read_config(run: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's configuration and the training settings that config.json states."""
    body = read_json(require_run(run) / "config.json")
    for part, what in (("model", "no model"), ("train", "no settings of training")):
        if not isinstance(body.get(part), dict):
            raise CorruptError(f"{run}/config.json: states {what}")
    unknown = body["model"].keys() - {f.name for f in fields(ModelConfig)}
    if unknown:
        raise CorruptError(f"{run}/config.json: unknown model setting {sorted(unknown)[0]!r}")
    if body["model"].get("vocab_size") is None:
        raise CorruptError(f"{run}/config.json: the model has no vocab_size")
    try:
        model = ModelConfig(**body["model"])
    except UsageError as error:
        raise CorruptError(f"{run}/config.json: {error}") from None
    if model.bos_id is not None and model.bos_id not in range(model.vocab_size):
        raise CorruptError(f"{run}/config.json: bos_id is {model.bos_id!r}")
    return model, body["train"]


def read_facts(run: Path) -> dict[str, Any]:
    """All that config.json says; CorruptError unless it says what a run goes on with."""
    facts = read_json(require_run(run) / "config.json")
    for name in ("corpus", "corpus_key", "tokenizer_sha256"):
        if not isinstance(facts.get(name), str):
            raise CorruptError(f"{run}/config.json: {name} is {facts.get(name)!r}, not a text")
    if type(facts.get("asked_vocab_size")) not in (int, type(None)):
        raise CorruptError(f"{run}/config.json: asked_vocab_size is no number")
    if facts.get("data_order", 1) not in (1, 2):
        raise CorruptError(f"{run}/config.json: data_order is {facts['data_order']!r}, not 1 or 2")
    return facts


def data_order(run: Path) -> int:
    """Return the number of the order in which a run reads its data; older runs state none."""
    return read_facts(run).get("data_order", 1)


def fixed_of(run: Path) -> dict[str, Any]:
    """What a run that has no checkpoint yet decided at its start: threads, dtype, micro-batch."""
    facts = read_json(run / "config.json")
    return {name: facts[name] for name in ("threads", "dtype", "micro_batch_size", "ranks")}


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
