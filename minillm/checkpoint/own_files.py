"""Recognise the files that minillm wrote into a run's folder by their content.

A name is not enough: other programs write a metrics.jsonl too, and a config.json that was copied
into a folder makes it a run. Only the beginning of a file is read.
"""

import os
import re
from pathlib import Path

from minillm.runtime.files import file_digest, read_json
from minillm.runtime.ownership import is_plain_file

# The files that a run writes into its folder, each by way of NAME.tmp. It also has checkpoints/.
TOKENIZERS = ("tokenizer.model", "tokenizer.json")
FILES = ("config.json", *TOKENIZERS, "metrics.jsonl", "samples.txt", "bad-steps.jsonl")
# The content of `lock`. It marks a folder without config.json as a run that has begun.
MARK = b"minillm writes a run in this folder; the process that does holds a lock on this file.\n"

BEGINNING = 1 << 16  # bytes that are read of a file
# How a line of each file begins, with 1 in place of every number.
LINES = {
    "config.json": b'{\n "version": 1,',
    "tokenizer.json": b'{"version": 1, "kind": "',
    "tokenizer.model": b"\n\x0e\n\x05<unk>",  # SentencePiece's first token, in protobuf
    "metrics.jsonl": b'{"step": 1, "tokens": 1',
    "bad-steps.jsonl": b'{"step": 1, "position": 1',
    "samples.txt": b"=== step 1",
}


def other_file(run: Path) -> str | None:
    """Return the name of a file that has the name of one of a run's files, but is another's.

    run: folder of a run, whose config.json is intact

    It is None if there is no such file.
    """
    stated = read_json(run / "config.json")["tokenizer_sha256"]
    for name in (*FILES[1:], *(f"{name}.tmp" for name in FILES), "lock"):
        path = run / name
        if not os.path.lexists(path):
            continue
        if name in TOKENIZERS:
            ours = is_plain_file(path) and file_digest(path) == stated
        else:
            ours = looks_ours(path)
        if not ours:
            return name
    return None


def looks_ours(path: Path) -> bool:
    """Return whether a file in a run's folder is empty or has the content that its name promises.

    path: the file, which may have the temporary name of one. A process may have been killed while
        it wrote the file.
    """
    if not is_plain_file(path):
        return False
    with path.open("rb") as file:
        data = file.read(BEGINNING)
    if path.name == "lock":
        return MARK.startswith(data)  # empty in earlier releases
    data, line = re.sub(rb"\d+", b"1", data), LINES[path.name.removesuffix(".tmp")]
    return data.startswith(line) or b"\n" + line in data or line.startswith(data)


def is_temporary(path: Path) -> bool:
    """Return whether a file in a run's folder is a file of the run under its temporary name."""
    name = path.name.removesuffix(".tmp")
    return name != path.name and name in FILES and looks_ours(path)
