"""Nothing gets its name before it is on the disk; and the account that says so misses no call."""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from minillm.checkpoint.write import prune, save
from minillm.data import prepare as corpus
from minillm.runtime.files import building, write_json, write_whole
from minillm.training import metrics as meter
from tests.support.faults import CHANGES, calls_of

ROOT = Path(__file__).resolve().parents[2]


def left_unsynced(calls: list[tuple[str, str]]) -> set[str]:
    """What was not synced at the end, files and folders (whose names changed).

    AssertionError if something was renamed that was not on the disk by then, or lay in something
    that was not.
    """
    dirty = set()
    for name, path in calls:
        if name == "rename":
            waiting = {p for p in dirty if p == path or p.startswith(path + "/")}
            assert not waiting, f"{path} gets its name before these are on the disk: {waiting}"
        if name in ("write", "truncate"):
            dirty.add(path)
        elif name in ("create", "mkdir", "rename", "unlink", "rmdir"):
            dirty.add(os.path.dirname(path))  # noqa: PTH120
        elif name == "fsync":
            dirty.discard(path)
    return dirty


def save_twice(run: Path, pruned: bool = True) -> None:
    """Two checkpoints, the second of which leaves no room for the first."""
    for step in (1, 2):
        tensors = {"model": {"w": torch.ones(40, 30)}, "optimizer": {"exp_avg.w": torch.ones(9)}}
        save(run, step, tensors, {})
    if pruned:
        prune(run, 1, best=None)


def prepare(root: Path, text: Path) -> None:
    """A small corpus, in several shards."""
    how = corpus.Preparation(tokenizer="byte", val_fraction=0.05, shard_tokens=2000, workers=1)
    corpus.prepare([str(text)], how, out=root / "words", say=lambda line: None)


def test_what_is_saved_is_on_the_disk_before_it_has_its_name(tmp_path):
    calls = calls_of(tmp_path, lambda: save_twice(tmp_path, pruned=False))
    assert left_unsynced(calls) == set()
    for step in (1, 2):  # the manifest last of all, then the folder, its name and its parent
        temporary = str(tmp_path / "checkpoints" / f".step-0000000{step}.tmp")
        end = calls.index(("rename", temporary))
        changed = [call for call in calls[:end] if call[0] in CHANGES]
        assert changed[-2:] == [
            ("rename", f"{temporary}/manifest.json.tmp"), ("fsync", temporary)
        ]  # fmt: skip
        made = [path for name, path in changed if name == "create" and path.startswith(temporary)]
        assert len(made) == 4 and made[-1].endswith("/manifest.json.tmp")
        assert calls[end + 1 :][1] == ("fsync", str(tmp_path / "checkpoints"))


def test_what_is_prepared_is_on_the_disk_before_it_has_its_name(tmp_path, text_file):
    calls = calls_of(tmp_path, lambda: prepare(tmp_path, text_file))
    # A folder is asked for that is there already: nothing changes in its parent.
    assert calls[1] == ("mkdir", str(tmp_path))
    assert left_unsynced(calls[2:]) == set()


def test_what_is_built_is_on_the_disk_before_it_has_its_name(tmp_path):
    def build() -> None:
        with building(tmp_path / "new" / "folder") as temporary:
            write_whole(temporary / "file", [b"data"])

    calls = calls_of(tmp_path, build)
    assert left_unsynced(calls) == {str(tmp_path)}  # where "new" is, which may be lost with it


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path):
    calls = calls_of(tmp_path, lambda: write_json(tmp_path / "config.json", {}))
    assert left_unsynced(calls) == set()
    assert [name for name, _ in calls if name in CHANGES] == [
        "create", "write", "fsync", "rename", "fsync"
    ]  # fmt: skip


WORKS = {
    "save": save_twice,
    "append": lambda root, *_: meter.append(root / "samples.txt", "text"),
    "prepare": prepare,
}


def changes(calls: list[tuple[str, str]], root: Path) -> list[tuple[str, str]]:
    """Those that change something, by paths from `root` on, without what is drawn by lot."""
    return [
        (name, re.sub(r"\.[0-9a-f]{8}\.tmp", ".tmp", path.removeprefix(str(root))))
        for name, path in calls
        if name in CHANGES
    ]


def traced(file: Path, root: Path) -> list[tuple[str, str]]:
    """What strace saw of calls on paths under `root`, as `faults` names them."""
    found = []
    line = re.compile(r'\d+ +(\w+)\((?:[^<"]*<([^>]*)>)?(?:, )?(?:"([^"]*)")?(.*)')
    for match in filter(None, map(line.match, file.open())):
        name, handle, path, rest = match.groups()
        path = None if "write" in name else path  # there it is the data
        place = os.path.join(handle or "", path or "").rstrip("/")  # noqa: PTH118
        if name.startswith("open"):
            name = "create" if "O_CREAT" in rest else "look"
        elif name == "unlinkat":
            name = "rmdir" if "AT_REMOVEDIR" in rest else "unlink"
        else:  # pwrite64, ftruncate, renameat2 ...
            name = next(known for known in CHANGES if known in name.replace("data", ""))
        if place.startswith(f"{root}/") or place == str(root):
            found.append((name, place))
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("work", WORKS)
def test_the_system_sees_the_same_calls(tmp_path, text_file, work):
    """What Python's functions are asked for is all that happens: no call below goes unmet."""
    seen, counted = tmp_path / "seen", tmp_path / "counted"
    seen.mkdir()
    counted.mkdir()
    if subprocess.run(["strace", "true"], capture_output=True).returncode:
        pytest.skip("strace may not trace here")
    calls = calls_of(counted, partial(WORKS[work], counted, text_file))
    kinds = "open,openat,write,pwrite64,writev,fsync,fdatasync,truncate,ftruncate,mkdir,mkdirat," \
        "rename,renameat,renameat2,unlink,unlinkat,rmdir"  # fmt: skip
    script = "import sys; from pathlib import Path; from tests.system.test_write_order import WORKS"
    script += f"; WORKS[{work!r}](Path(sys.argv[1]), Path(sys.argv[2]))"
    trace = ["strace", "-f", "-y", "-e", f"trace={kinds}", "-e", "signal=none", "-o"]
    command = [*trace, tmp_path / "trace", sys.executable, "-c", script, seen, text_file]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    expected = changes(calls, counted)
    assert changes(traced(tmp_path / "trace", seen), seen) == expected and expected
