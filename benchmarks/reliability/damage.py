"""Damage every kind of file that is read, and count how the damage is handled.

    python benchmarks/reliability/damage.py 1000

Makes a small run with two checkpoints and a prepared corpus, damages one file at a time, and reads
everything as sample.py and train.py --resume do. Each kind of file gets the given number of
single-bit flips and of truncations, a tenth of that number of overwritten stretches and of zeroed
pages, and all pairs of files of a folder are swapped. Damage is "refused" if a CorruptError names
the file, or if the older checkpoint is taken and a warning names it. It is "harmless" if the result
is the same to the last bit, and "accepted" if it is not. Any other exception is a bug. Prints a
table.
"""

import argparse
import hashlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from minillm import errors
from minillm.checkpoint.find import load_run, open_checkpoint
from minillm.checkpoint.run_folder import RunFolder
from minillm.data.batches import Tokens
from minillm.data.prepare import Preparation, prepare
from minillm.data.shards import open_corpus
from minillm.runtime import program
from minillm.scripts import train as train_script

PAGE = 4096
EDGE = 8  # bytes at both ends of a file, each of which is damaged in any case
OUTCOMES = ("refused", "harmless", "accepted", "bug")
LAST = "checkpoints/step-00000008"
RUN_FILES = {
    "model": f"{LAST}/model-00001-of-00001.safetensors",
    "optimizer": f"{LAST}/optimizer-00001-of-00001.safetensors",
    "averages": f"{LAST}/ema-00001-of-00001.safetensors",
    "state": f"{LAST}/state.json",
    "manifest": f"{LAST}/manifest.json",
    "configuration": "config.json",
    "tokenizer.model": "tokenizer.model",
}
CORPUS_FILES = {
    "shard": "train-00000.bin",
    "shard, held out": "val-00000.bin",
    "index": "index.json",
    "tokenizer.json": "tokenizer.json",
}
FLAGS = (
    "--vocab-size 400 --val-fraction 0.1 --n-layer 1 --n-head 2 --d-model 16 --seq-len 16 "
    "--batch-size 4 --steps 8 --threads 1 --dtype fp32 --eval-every 4 --eval-batches 2 "
    "--final-eval-batches 2 --ema 0.9 --save-every 4 --device cpu"
)


@dataclass(frozen=True)
class Victim:
    """A folder whose files are damaged.

    read: function from the folder and a function for warnings to the digest of all that was read
    """

    folder: Path
    files: dict[str, str]
    read: Callable[[Path, Callable[[str], None]], str]


def make(place: Path) -> list[Victim]:
    """Make a run and a corpus in a folder, and return them."""
    numbers = random.Random(0)
    words = "the cat sat on a mat and dogs ran far".split()
    text = ".\n".join(" ".join(numbers.choices(words, k=8)) for _ in range(20_000))
    (place / "all.txt").write_text(text, encoding="utf-8", newline="")
    (place / "some.txt").write_text(text[:8000], encoding="utf-8", newline="")
    run = place / "run"
    given = ["--data", place / "some.txt", "--out", run, "--cache-dir", place / "prepared"]
    if program.run("train.py", train_script.main, [*map(str, given), *FLAGS.split()]):
        sys.exit("the run to damage could not be made")
    how = Preparation(tokenizer="char", val_fraction=0.05)
    corpus = prepare([str(place / "all.txt")], how, cache_dir=place, say=lambda s: s)
    return [Victim(run, RUN_FILES, read_run), Victim(corpus.folder, CORPUS_FILES, read_corpus)]


def read_run(run: Path, say: Callable[[str], None]) -> str:
    """Read everything of a run that sample.py and train.py --resume read; return its digest.

    run: the run
    say: receives the warnings
    """
    found = RunFolder(run)
    digest = hashlib.sha256(repr((found.model, found.train, found.facts)).encode())
    found.newest_settings()
    past = open_checkpoint(run, say=say)
    digest.update(repr(past.state).encode())
    for kind in sorted(past.kinds):
        for name, t in sorted(past.tensors(kind).items()):
            digest.update(repr((kind, name, t.dtype, t.shape)).encode() + t.numpy().tobytes())
    model, tokenizer, _ = load_run(run, checkpoint=past)
    digest.update(b"".join(p.numpy().tobytes() for p in model.parameters()) + tokenizer.to_bytes())
    return digest.hexdigest()


def read_corpus(folder: Path, say: Callable[[str], None]) -> str:
    """Read a prepared corpus with all its tokens; return its digest.

    folder: the corpus
    say: receives the warnings
    """
    corpus = open_corpus(folder)
    digest = hashlib.sha256(repr(corpus).encode() + corpus.tokenizer().to_bytes())
    for split in ("train", "val"):
        tokens = Tokens(corpus, split)
        digest.update(tokens.read(0, len(tokens)).tobytes())
    return digest.hexdigest()


def flips(data: bytes, draw: random.Random, count: int) -> Iterator[bytes]:
    """Yield copies with one bit changed: at random, and in each of the first and last bytes.

    data: content of the file
    draw: random numbers
    count: number of copies
    """
    edges = sorted({*range(EDGE), *range(len(data) - EDGE, len(data))})
    for at in [*edges, *(draw.randrange(len(data)) for _ in range(count - len(edges)))]:
        changed = bytearray(data)
        changed[at] ^= 1 << draw.randrange(8)
        yield bytes(changed)


def cuts(data: bytes, draw: random.Random, count: int) -> Iterator[bytes]:
    """Yield beginnings of the data: of random length, almost nothing, and almost all.

    data: content of the file
    draw: random numbers
    count: number of copies
    """
    edges = [*range(EDGE), *range(len(data) - EDGE, len(data))]
    for end in [*edges, *(draw.randrange(len(data)) for _ in range(count - len(edges)))]:
        yield data[:end]


def stretches(data: bytes, draw: random.Random, count: int) -> Iterator[bytes]:
    """Yield copies with up to a page of other bytes.

    data: content of the file
    draw: random numbers
    count: number of copies
    """
    for _ in range(count):
        at, n = draw.randrange(len(data)), draw.randint(2, PAGE)
        changed = data[:at] + draw.randbytes(n)[: len(data) - at] + data[at + n :]
        if changed != data:
            yield changed


def zeroes(data: bytes, draw: random.Random, count: int) -> Iterator[bytes]:
    """Yield copies with a page of zeros, which a system leaves that has lost a page.

    data: content of the file
    draw: random numbers
    count: number of copies
    """
    for _ in range(count):
        at = draw.randrange(len(data)) // PAGE * PAGE
        changed = data[:at] + bytes(len(data[at : at + PAGE])) + data[at + PAGE :]
        if changed != data:
            yield changed


KINDS = {"flips": flips, "truncations": cuts, "other bytes": stretches, "zero pages": zeroes}


def judged(victim: Victim, names: list[str], good: str, older: str | None) -> str:
    """Return one of OUTCOMES for damaged files of a victim.

    victim: the folder
    names: the damaged files
    good: digest of what is read without damage
    older: digest of what is read without the last checkpoint
    """
    said: list[str] = []
    try:
        found = victim.read(victim.folder, said.append)
    except errors.CorruptError as error:
        found, said = older, [str(error)]
    except Exception as error:
        print(f"{names}: {type(error).__name__}: {error}", file=sys.stderr)
        return "bug"
    if found == good and not said:
        return "harmless"
    named = any(name in line and "\n" not in line for name in names for line in said)
    return "refused" if named and found == older else "accepted"


def without_the_last(victim: Victim) -> str | None:
    """Return the digest of what is read if the last checkpoint is missing."""
    last = victim.folder / LAST
    if not last.is_dir():
        return None
    away = last.rename(last.with_name("away"))
    older = victim.read(victim.folder, print)
    away.rename(last)
    return older


def trials(victim: Victim, count: int, seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """Yield (kind of file, kind of damage, outcome) of each damage to each file of a victim.

    A tenth of the trials are of the rarer kinds, and each pair of the files is swapped.

    victim: the folder
    count: number of trials of each kind of file
    seed: random seed
    """
    good, older = victim.read(victim.folder, print), without_the_last(victim)
    for kind, name in victim.files.items():
        path, draw = victim.folder / name, random.Random(f"{seed} {kind}")
        data = path.read_bytes()
        for damage, made in KINDS.items():
            often = count if damage in ("flips", "truncations") else -(-count // 10)
            for changed in made(data, draw, often):
                path.write_bytes(changed)
                yield kind, damage, judged(victim, [path.name], good, older)
        path.write_bytes(data)
    for one, other in combinations(victim.files, 2):
        paths = [victim.folder / victim.files[kind] for kind in (one, other)]
        before = [path.read_bytes() for path in paths]
        for path, data in zip(paths, reversed(before), strict=True):
            path.write_bytes(data)
        yield one, "swaps", judged(victim, [path.name for path in paths], good, older)
        for path, data in zip(paths, before, strict=True):
            path.write_bytes(data)
    if victim.read(victim.folder, print) != good:
        raise AssertionError(f"{victim.folder} is not what it was")


def table(counts: Counter) -> str:
    """Return a table in Markdown with a line for each kind of file."""
    damages = [*KINDS, "swaps"]
    lines = [f"| file | {' | '.join(damages)} | {' | '.join(OUTCOMES)} |"]
    lines.append("|---" * (1 + len(damages) + len(OUTCOMES)) + "|")
    for kind in dict.fromkeys(kind for kind, _, _ in counts):
        own = {key[1:]: n for key, n in counts.items() if key[0] == kind}
        tried = [sum(n for (d, _), n in own.items() if d == damage) for damage in damages]
        came = [sum(n for (_, o), n in own.items() if o == outcome) for outcome in OUTCOMES]
        lines.append(f"| {kind} | {' | '.join(map(str, tried + came))} |")
    return "\n".join(lines)


def main() -> None:
    """Damage the files, count the outcomes and print them."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("count", type=int, nargs="?", default=1000, help="flips of each kind of file")
    args = p.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        victims = make(Path(place))
        counts = Counter(trial for v in victims for trial in trials(v, args.count))
    print(table(counts))
    print(f"{counts.total()} damages in {time.monotonic() - start:.0f} s")
    sys.exit(any(outcome in ("accepted", "bug") for _, _, outcome in counts))


if __name__ == "__main__":
    main()
