"""Load a SentencePiece model from elsewhere in a separate process first, as it may crash.

Some files crash the library and so the whole process (SentencePiece issues 1263 and 1269).
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

from minillm.errors import CorruptError, UnavailableError

PATIENCE_S = 60
REFUSED = 3
# Loads the model as tokenizer.py does. Its imports take 0.1 s, as torch is not among them.
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
    """Raise CorruptError if a model cannot be loaded or crashes SentencePiece.

    path: file of the model, for the message
    data: its content
    Raises UnavailableError if no process can be started.
    """
    command = [sys.executable, "-c", TRIAL, json.dumps(sys.path)]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise CorruptError(f"{path}: loading it takes more than {PATIENCE_S} s") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise CorruptError(f"{path}: damaged or malicious: it crashes SentencePiece ({name})")
    if done.returncode == REFUSED:
        raise CorruptError(f"{path}: not a SentencePiece model, or damaged")
    if done.returncode:
        why = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise UnavailableError(f"{path}: no process can be started to try it: {why}")
