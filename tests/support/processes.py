"""Several ranks as real processes, for the tests that need them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def complaints(
    script: str, folder: Path, names: Callable[[int], Iterable[str]] = lambda size: ()
) -> Callable[[int], list[dict[str, str]]]:
    """said(size): what each rank's checks complained about, check -> text ("": nothing).

    script: prints that as JSON, of FOLDER and names(size); launched once a size, two ranks first.
    Where several processes run the tests, one of them launches, and each copies what was left.
    """
    found = {}
    several = folder.parent.name.startswith("popen-")  # pytest-xdist's folder of one process
    place = folder.parents[1] / Path(script).stem if several else folder

    def said(size: int) -> list[dict[str, str]]:
        for n in (2, size):
            if n not in found:
                with _alone_in(place):
                    told = place / f"said-{n}.json"
                    if not told.exists():
                        told.write_text(json.dumps(launch(n, script, place, *names(n))))
                    found[n] = [json.loads(text) for text in json.loads(told.read_text())]
                    if several:
                        shutil.copytree(place, folder, dirs_exist_ok=True)
        return found[size]

    return said


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One process at a time; the folder is made if need be."""
    import fcntl

    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def launch(size: int, script: str | Path, *args: object, seconds: float = 120) -> list[str]:
    """What each of `size` ranks of `script` (a file, from the root) prints on standard output.

    Each is told its place as torchrun would; rank 0 keeps the store. As soon as one fails, or after
    `seconds`, all are killed, and an AssertionError shows the last lines of the failed one.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        files = [
            [Path(folder) / f"{rank}.{kind}" for kind in ("out", "err")] for rank in range(size)
        ]
        ranks = []
        try:
            for rank, (out, err) in enumerate(files):
                with out.open("w") as to_out, err.open("w") as to_err:
                    ranks.append(
                        subprocess.Popen(
                            [sys.executable, str(ROOT / script), *map(str, args)],
                            stdout=to_out, stderr=to_err, cwd=ROOT,
                            env=_environment(rank, size, port),
                        )
                    )  # fmt: skip
            failed, why = _wait(ranks, seconds)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if why:
            shown = "\n".join(f"rank {r}: {files[r][1].read_text()[-3000:]}" for r in failed)
            raise AssertionError(f"{why}\n{shown}")
        return [out.read_text() for out, _ in files]


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip


def _wait(ranks: list[subprocess.Popen], seconds: float) -> tuple[list[int], str]:
    """Until all have ended or one has failed: (who to listen to, what went wrong or nothing)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codes = [process.poll() for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            return failed, f"ranks {failed} failed with {[codes[r] for r in failed]}"
        if None not in codes:
            return [], ""
        time.sleep(0.05)
    late = [rank for rank, process in enumerate(ranks) if process.poll() is None]
    return late, f"ranks {late} were not done after {seconds:g} s"
