"""Kinds of training for kill_trials.py: how to start one, and its result without disturbance."""

import random
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from killing import COUNTERS, Child, place_of, traces

from tests.support.processes import free_port

EVERY = 2  # steps from save to save
HANGS_S = 120.0  # longest life of a process
STEPS = 12
# The way in which each process is killed, for a new run and for a resumed one: by the clock (""),
# or at a call of one of the counters.
AIMS = {
    False: ["saving", "opening", "saving", "", "saving"],
    True: ["saving", "", "saving", "pruning", "saving", "", "saving", "opening", "saving", ""],
}
VICTIMS = {1: [[0]], 2: [[0], [1], [0, 1]]}
COMMON = (
    "--val-fraction 0.1 --n-head 2 --d-model 64 --seq-len 32 --batch-size 8 --micro-batch-size 4 "
    f"--steps {STEPS} --threads 1 --dtype fp32 --device cpu --log-every 1 --save-every {EVERY} "
    "--keep-last 2 --eval-every 5 --eval-batches 2 --final-eval-batches 2 --dropout 0.1 "
    "--learning-rate 0.01 "
)
KINDS = {
    1: ["--tokenizer byte --recurrent 1,1,1 --mean-recurrence 2 --ema 0.9 --optimizer adamw",
        "--tokenizer char --n-layer 2 --optimizer muon"],
    2: ["--tokenizer byte --recurrent 1,1,1 --mean-recurrence 2 --optimizer adamw --zero 1 "
        "--rank-timeout 10",
        "--tokenizer char --n-layer 2 --optimizer muon --zero 2 --rank-timeout 10"],
}  # fmt: skip


class Course:
    """One kind of training: how to start it, and its result without disturbance."""

    def __init__(self, place: Path, kind: str, size: int) -> None:
        self.place, self.kind, self.size = place, kind, size
        self.text = place / "words.txt"
        if not self.text.exists():
            draw = random.Random(0)
            words = "the cat sat on a mat and dogs ran far".split()
            lines = (" ".join(draw.choices(words, k=8)) + ".\n" for _ in range(300))
            self.text.write_text("".join(lines), encoding="utf-8", newline="")
        run = self.new_run()
        whole = self.launch(run)
        self.life_s = ended(whole, run)
        self.traces = traces(run)
        run = self.new_run()
        broken = self.launch(run)
        while broken[0].board.step < STEPS // 2 and broken[0].code is None:
            time.sleep(0.002)
        for child in broken:
            child.end()
        resumed = self.go_on(run)
        # How many calls there are to be killed at: [launch is a resumption][rank][counter].
        self.calls = [
            [{name: getattr(child.board, name) for name in COUNTERS} for child in each]
            for each in (whole, resumed)
        ]
        self.aims = {resumes: cycle(aims) for resumes, aims in AIMS.items()}
        self.victims = cycle(VICTIMS[size])

    def new_run(self) -> Path:
        """Return the folder of the next run, next to the text that it prepares for itself."""
        return Path(tempfile.mkdtemp(dir=self.place)) / "run"

    def launch(self, run: Path, die_at: dict[int, tuple] | None = None, **more: Any) -> list[Child]:
        """Start the processes of a launch: the first command, or --resume alone if there is a run.

        run: folder of the run
        die_at: number of the board at which a process kills itself, see Child
        more: further options of Child
        """
        argv = ["--resume", str(run)]
        if not (run / "config.json").is_file():
            argv = ["--data", str(self.text), "--out", str(run), "--cache-dir",
                    str(run.parent / "prepared"), *COMMON.split(), *self.kind.split()]  # fmt: skip
        port = free_port() if self.size > 1 else 0
        places = [place_of(r, self.size, port) if port else None for r in range(self.size)]
        log = run.parent / f"log-{len(list(run.parent.glob('log-*')))}"
        return [
            Child(argv, log.with_name(f"{log.name}.{r}"), at, where, **more)
            for r, where in enumerate(places)
            for at in [(die_at or {}).get(r, ("", 0))]
        ]

    def go_on(self, run: Path, also: int = 0) -> list[Child]:
        """Resume a run to its end, undisturbed, and check that it equals an undisturbed run.

        run: folder of the run
        also: step that was saved although it was not due, so that another one is no longer kept
        """
        children = self.launch(run)
        ended(children, run)
        calm(children, run)
        left = [p for p in run.parent.rglob("*") if p.name.endswith(".tmp")]
        expect(not left, f"left: {left}", run)
        found = traces(run)  # it has more checkpoints if a deletion was killed
        for what, other in self.traces.items():
            one = found.get(what, other if also and not what.endswith(f" {STEPS}") else None)
            expect(one == other, f"{what} is {one}, undisturbed {other}", run)
        return children


def ended(children: list[Child], run: Path) -> float:
    """Wait until all processes have ended with code 0; return the seconds.

    children: the processes
    run: folder of the run, for messages
    """
    try:
        codes = [child.wait(child.start + HANGS_S) for child in children]
    finally:
        for child in children:
            child.end()
    expect(set(codes) == {0}, f"undisturbed, it ended with {codes}", run)
    return time.monotonic() - children[0].start


def expect(good: bool, why: str, run: Path) -> None:
    """Raise AssertionError with the last lines that every process of the run printed.

    good: the condition that must hold
    why: the message
    run: folder of the run
    """
    if not good:
        logs = sorted(run.parent.glob("log-*"))
        said = "\n".join(f"{log.name}: {log.read_text(encoding='utf-8')[-400:]}" for log in logs)
        raise AssertionError(f"{run}: {why}\n{said}")


def calm(children: list[Child], run: Path) -> None:
    """Raise AssertionError if the output looks like a bug, or like an incomplete checkpoint.

    children: the processes
    run: folder of the run
    """
    for child in children:
        for sign in ("Traceback", "bug in minillm", "Exception ignored", "going on from step"):
            expect(sign not in child.said, f"said {sign!r}", run)
