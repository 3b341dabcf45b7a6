"""SentencePiece models from elsewhere: tried in a process of their own before they are trusted.

Some files crash the library that loads them (its issues 1263 and 1269), and the process with it.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

from minillm.errors import CorruptError, UnavailableError

PATIENCE_S = 60
REFUSED = 3
# Loads the model as tokenizer.py will, probes and all. What it imports takes 0.1 s; not torch.
TRIAL = f"""
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from minillm.data.tokenizer import BpeTokenizer
try:
    BpeTokenizer(sys.stdin.buffer.read())
except Exception:
    sys.exit({REFUSED})
"""


def try_model(path: Path, data: bytes) -> None:
    """Raise CorruptError if the model in `data`, read from `path`, fails or crashes its loader.

    Raises UnavailableError if no process can be started to find out.
    """
    command = [sys.executable, "-c", TRIAL, json.dumps(sys.path)]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise CorruptError(f"{path}: loading it takes more than {PATIENCE_S} s") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise CorruptError(f"{path}: damaged or hostile, it crashes its loader ({name})")
    if done.returncode == REFUSED:
        raise CorruptError(f"{path}: not a SentencePiece model, or damaged")
    if done.returncode:
        why = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise UnavailableError(f"{path}: no process can be started to try it: {why}")
