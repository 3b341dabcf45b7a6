"""Part `main`: run train.py and sample.py as a user does. Their output is in the log."""

import re
import subprocess
import sys
import time

from benchmarks.device_parts.session import Session

PROMPT = "import os\n"
TINY = (
    "--steps 2 --n-layer 1 --d-model 32 --n-head 2 --seq-len 32 --batch-size 2 --tokenizer byte "
    "--eval-batches 1 --threads 1 --kernels eager"
).split()
# 124M parameters without a compiler, which would take most of the time.
SMALL = (
    "--preset small --compile false --tokenizer byte --vocab-size 50304 --batch-size 64 "
    "--micro-batch-size 32 --eval-every 0 --time-limit 12"
).split()


def run(session: Session) -> None:
    """Train the default model and sample from it; then train 124M parameters for some seconds."""
    out = session.scratch / "default"
    flags = ["--time-limit", "15"]
    if session.dry:
        flags = [*TINY, "--data", str(_text(session)), "--cache-dir", str(session.scratch)]
    _program(session, ["train.py", *flags, "--out", str(out)])
    length = "5" if session.dry else "200"
    _program(session, ["sample.py", str(out), "--prompt", PROMPT, "--max-tokens", length])
    if not session.dry and not session.late(command="train.py --preset small"):
        _program(session, ["train.py", *SMALL, "--out", str(session.scratch / "small")])


def _text(session: Session):
    """Write a small text for the dry run, so that it need not prepare the default one."""
    path = session.scratch / "text.txt"
    path.write_text("the cat sat on a mat and the dogs ran far\n" * 200, encoding="utf-8")
    return path


def _program(session: Session, words: list[str]) -> None:
    """Run a program of the checkout, and write its exit code and its last lines about speed."""
    start = time.monotonic()
    print(f"$ python {' '.join(words)}", flush=True)
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines += [line.strip()] if line.strip() else []
    code = process.wait()
    speeds = [line for line in lines if re.search(r"tok|mfu|step", line)]
    session.emit(
        verdict="right" if code == 0 else f"WRONG: exit code {code}",
        command=" ".join(words).replace(str(session.scratch), "DIR"),
        seconds=round(time.monotonic() - start, 1),
        said=" / ".join((speeds or lines)[-2:]),
    )
