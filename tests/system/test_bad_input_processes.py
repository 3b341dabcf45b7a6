"""Bad surroundings: closed, full and abandoned streams, another locale, no home, no folder.

Each needs a process of its own. `prepare` does not import torch, so that most take half a second.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    os.name != "posix" or not (ROOT / "setup.py").is_file(), reason="a shell and the source tree"
)

# What the shell runs, the codes it may end with, what standard error then holds.
# $M: python -m minillm; $P: python; $R: a run.
GONE = "the folder that this was started in is gone; change to another"
CASES = {
    "a reader that went away": ("$M prepare --help | true; exit ${PIPESTATUS[0]}", (0, 141), ""),
    "head": ("$M --help | head -c 5; exit ${PIPESTATUS[0]}", (0, 141), ""),
    "no reader of the errors": ("$M prepare none 2>&1 | true; exit ${PIPESTATUS[0]}", (2, 141), ""),
    "standard output closed": ("$M --help >&-", (0,), ""),
    "standard error closed": ("$M prepare none 2>&-", (2,), ""),
    "all closed": ("$M prepare none <&- >&- 2>&-", (2,), ""),
    "standard input closed": ("$M prepare none <&-", (2,), "none: no such file or folder"),
    "standard output full": ("$M prepare --help >/dev/full", (5,), "No space left on device"),
    "standard error full": ("$M prepare none 2>/dev/full", (2,), ""),
    "unbuffered, full": ("PYTHONUNBUFFERED=1 $M prepare none 2>/dev/full", (2,), ""),
    "bytes in the C locale": (
        "env -i LANG=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONPATH=$PYTHONPATH "
        "$M prepare $'caf\\xe9'", (2,), r"caf\udce9: no such file or folder",
    ),
    "UTF-8 in the C locale": (
        "env -i LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONPATH=$PYTHONPATH "
        "$M prepare $'\\xe2\\x80\\xae\\xf0\\x9f\\x99\\x82'", (2,), "no such file or folder",
    ),
    "no home, no user, nothing": (
        "env -i PYTHONPATH=$PYTHONPATH $M prepare none", (2,), "none: no such file or folder",
    ),
    "the folder is gone": ("mkdir d; cd d; rmdir ../d; $M prepare x.txt", (5,), GONE),
    "no verb": ("$M", (2,), "which verb? one of: train, sample, prepare"),
}  # fmt: skip
SLOW = {  # with torch
    "sample into head": (
        "$P $ROOT/sample.py $R --max-tokens 3000 | head -c 5; exit ${PIPESTATUS[0]}", (0, 141), "",
    ),
    "sample into nothing": ("$P $ROOT/sample.py $R --max-tokens 5 >&-", (0,), "5 tokens in"),
    "sample on a full disk": (
        "$P $ROOT/sample.py $R --max-tokens 5 >/dev/full", (5,), "No space left on device",
    ),
    "no line to read": ("$P $ROOT/sample.py $R --interactive <&-", (0,), "seed 0"),
    "a prompt in no encoding": (
        "env -i LANG=C PYTHONPATH=$PYTHONPATH $P $ROOT/sample.py $R --prompt $'caf\\xe9'",
        (2,), "half a character at position 3",
    ),
    "text in the C locale": (
        "env -i LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONPATH=$PYTHONPATH "
        "$P $ROOT/sample.py $R --max-tokens 5 --prompt 'the cat'", (0,), "5 tokens in",
    ),
    # Where torch is with MKL, it ends the process with a line of its own, while it is imported.
    "train where the folder is gone": ("mkdir d; cd d; rmdir ../d; $P $ROOT/train.py", (2, 5), ""),
    "plan into a reader that went away": (
        "$M plan --flops 1e12 --memory-gbs 10 --n-layer 1 | true; exit ${PIPESTATUS[0]}",
        (0, 141), "",
    ),
}  # fmt: skip


def all_of(cases: dict, folder: Path, run: Path | None) -> list[str]:
    """Run the cases, two at a time; what was wrong with which."""
    wrong, names = [], list(cases)
    for at in range(0, len(names), 2):
        started = []
        for name in names[at : at + 2]:
            place = folder / name.replace(" ", "_")
            place.mkdir()
            environment = {
                **os.environ, "PYTHONPATH": str(ROOT), "ROOT": str(ROOT), "P": sys.executable,
                "M": f"{sys.executable} -m minillm", "R": str(run), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            environment.pop("PYTHONUNBUFFERED", None)
            shell = subprocess.Popen(
                ["bash", "-c", cases[name][0]], cwd=place, env=environment, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                encoding="utf-8", errors="replace",
            )  # fmt: skip
            started.append((name, shell))
        for name, shell in started:
            _, err = shell.communicate(timeout=120)
            _, codes, fragment = cases[name]
            if shell.returncode not in codes or fragment not in err:
                wrong.append(f"{name}: {shell.returncode}, {err}")
            if any(sign in err for sign in ("Traceback", "Exception ignored", "BrokenPipe")):
                wrong.append(f"{name}: {err}")
    return wrong


def test_bad_surroundings(tmp_path):
    assert all_of(CASES, tmp_path, None) == []


@pytest.mark.slow
def test_bad_surroundings_of_what_imports_torch(tmp_path, tiny_run):
    plain = tmp_path / "run"  # $R stands unquoted, and the run's name has a space
    plain.symlink_to(tiny_run)
    assert all_of(SLOW, tmp_path, plain) == []
