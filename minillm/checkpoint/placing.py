"""Choose, check and lock the folder of a new run.

Files are deleted only from a folder that is a run of minillm, and only if minillm wrote them.
"""

import glob
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from minillm.checkpoint.deletion import delete_all
from minillm.checkpoint.own_files import FILES, MARK, TOKENIZERS, is_temporary, other_file
from minillm.checkpoint.run_folder import RunFolder
from minillm.config.fields import as_tuple
from minillm.config.flags import Settings
from minillm.data.tokenizer import KINDS
from minillm.errors import UsageError, parameter
from minillm.runtime.files import sync_folder
from minillm.runtime.launch import shell_command
from minillm.runtime.ownership import RUN, claims, is_plain_file, is_run

# Everything that a run without config.json may hold. It was killed before its first step.
BEGUN = {"lock", "config.json.tmp", *(name + end for name in TOKENIZERS for end in ("", ".tmp"))}


def lock(run: Path) -> TextIO | None:
    """Lock a run for this process. Return the lock file, which keeps the lock until it is closed.

    The system closes the file when the process ends or is killed. The result is None on Windows,
    which has no such lock.
    Raises UsageError if another process holds the lock.
    """
    path = run / "lock"
    with suppress(FileExistsError), path.open("xb", buffering=0) as made:
        made.write(MARK)
        os.fsync(made.fileno())
    if 0 < path.stat().st_size < len(MARK) and MARK.startswith(path.read_bytes()):
        _mark(path)  # a process was killed after it had written half of it
    try:
        import fcntl
    except ImportError:
        return None
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        by = _holder(file)
        file.close()
        raise UsageError(f"{run} is being written by {by}; wait, or name another") from None
    return file


def _mark(lock: Path) -> None:
    """Write MARK, or its missing end, into a lock file of ours, and wait for the disk."""
    with lock.open("ab", buffering=0) as file:
        file.write(MARK[lock.stat().st_size :])
        os.fsync(file.fileno())


def _holder(file: TextIO) -> str:
    """Return which process has locked a file, if the system says so."""
    inode, table = os.fstat(file.fileno()).st_ino, Path("/proc/locks")
    for line in table.read_text(encoding="utf-8").splitlines() if table.is_file() else ():
        words = line.split()
        if words[1] == "FLOCK" and words[5].endswith(f":{inode}") and int(words[4]) > 0:
            return f"process {words[4]}"
    return "another process"


def check_out(
    run: Path, overwrite: bool, launch: str | None = None, sources: Iterable[tuple[str, str]] = ()
) -> None:
    """Raise UsageError unless a new run may be made in `run`.

    A new run may be made there if the folder does not exist, is empty, or is a run that may be
    overwritten.

    run: folder of the new run, which need not exist
    overwrite: whether a run of minillm may be overwritten; one that `launch` began and that has no
        checkpoint always may
    launch: the name of this torchrun launch; None: without torchrun
    sources: (parameter, path) of the files that the same command reads, which are not overwritten
    """
    if not run.exists() or (run.is_dir() and is_free(run)):
        return
    out = f"{parameter('out')} {run}"
    if not run.is_dir():
        raise UsageError(f"{out} is a file; name a folder")
    if not is_run(run):
        what = "holds other things than a run"
        if claims(run, RUN):
            what = "is a run whose config.json is damaged or of a newer minillm, so that its files "
            what += "cannot be distinguished from yours"
        raise UsageError(f"{out} {what}; name another folder")
    if not overwrite and (RunFolder(run).checkpoints() or not RunFolder(run).is_of(launch)):
        raise UsageError(
            f"{out} exists; continue it with {shell_command('train', '--resume', run)}, or "
            f"replace it with {parameter('overwrite')}"
        )
    for name in (*FILES, "lock", "checkpoints"):
        path = run / name
        fits = path.is_dir() if name == "checkpoints" else path.is_file()
        if path.is_symlink() or (path.exists() and not fits):
            raise UsageError(
                f"{out}: {name} in it is not what minillm wrote there, but a link or something "
                "of another kind; remove it, or name another folder"
            )
    if name := other_file(run):
        what = "is not one that minillm wrote there"
        if name in TOKENIZERS:
            what = "is not the tokenizer that the run was trained with"
        raise UsageError(f"{out}: {name} in it {what}; move it elsewhere, or name another folder")
    _refuse_sources(run, sources)


def is_free(folder: Path) -> bool:
    """Return whether a folder is empty, or holds only the files of a run without config.json."""
    names = {path.name for path in folder.iterdir()}
    if not names:
        return True
    lock = folder / "lock"
    if not names <= BEGUN or not is_plain_file(lock):
        return False
    held = lock.read_bytes() if lock.stat().st_size <= len(MARK) else b"?"
    # Alone, half of the mark is enough: a process was killed while it wrote it.
    return held == MARK if names != {"lock"} else MARK.startswith(held)


def sources(settings: Settings, config_file: str | None = None) -> list[tuple[str, str]]:
    """Return (parameter, path) of everything that a command reads and must not overwrite.

    settings: settings of the training
    config_file: the path given with --config
    """
    train = settings.train
    read = [("data", path) for path in as_tuple(train.data)]
    read += [("val", path) for path in as_tuple(train.val)]
    tokenizer = None if train.tokenizer in KINDS else train.tokenizer
    single = {"init_from": train.init_from, "tokenizer": tokenizer, "config": config_file}
    return read + [(name, path) for name, path in single.items() if path]


def _refuse_sources(run: Path, sources: Iterable[tuple[str, str]]) -> None:
    """Raise UsageError if the command reads something that overwriting `run` would delete."""
    place = run.resolve()
    own = {place, *(place / file for file in FILES)}
    for name, source in sources:
        for path in {source, *glob.glob(source, recursive=True)}:  # noqa: PTH207
            found = Path(path).resolve()
            if found in own or place / "checkpoints" in (found, *found.parents):
                raise UsageError(
                    f"{parameter('overwrite')} would delete {parameter(name)} {path}, which is "
                    f"part of {parameter('out')} {run}; name another folder"
                )


def make_run(
    out: str | None,
    name: str,
    overwrite: bool,
    launch: str | None = None,
    sources: Iterable[tuple[str, str]] = (),
) -> tuple[Path, TextIO | None]:
    """Make the folder of a new run and lock it. Return the folder and the lock file.

    out: the folder; None: runs/NAME-N, with the first number N that is free
    name: NAME
    overwrite, launch, sources: see check_out

    A run that may be overwritten is emptied, but files that minillm did not write stay. Raises
    UsageError as check_out does, and if another process has locked the folder.
    """
    if out is None:
        run = _make_next(Path("runs"), name)
        return run, lock(run)
    run, sources = Path(out), list(sources)
    check_out(run, overwrite, launch, sources)
    run.mkdir(parents=True, exist_ok=True)
    sync_folder(run.parent)
    held = lock(run)
    try:
        check_out(run, overwrite, launch, sources)  # again, now that no other process can write it
        _empty(run)
    except BaseException:
        if held:
            held.close()
        raise
    return run, held


def _empty(run: Path) -> None:
    """Delete the files of a run. If this is interrupted, the folder is still a run, or free.

    config.json is deleted last. If the folder holds files that minillm did not write, it stays
    until it is replaced, because without it the folder would not be a run.
    """
    if is_run(run):
        lock = run / "lock"
        if MARK.startswith(lock.read_bytes()):  # empty in earlier releases
            _mark(lock)
        delete_all(run / "checkpoints")
    for path in run.iterdir():
        if is_temporary(path) or (path.name in FILES[1:] and is_plain_file(path)):
            path.unlink()
    if {path.name for path in run.iterdir()} == {"lock", "config.json"}:
        (run / "config.json").unlink()


def _make_next(root: Path, name: str) -> Path:
    """Make and return the first of root/name-1, root/name-2, ... that does not exist."""
    n = 1
    while True:
        try:
            run = root / f"{name}-{n}"
            run.mkdir(parents=True)
            sync_folder(root)
            return run
        except FileExistsError:
            n += 1
