"""Trials for kill.py: kill a training or ask it to end, resume it, and compare the run.

This file decides when to kill which process, and which results must be the same afterwards.
killing.py starts the processes.
"""

import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from killing import COUNTERS, Child, last_step, place_of, traces

from minillm.checkpoint.run_folder import RunFolder
from tests.support.processes import free_port

TIMES = 4  # largest number of kills of a run
EVERY = 2  # steps from save to save
SURVIVES_S, HANGS_S = 40.0, 120.0  # a rank without the other, met or not; any process
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


@dataclass
class Kill:
    """One kill of a trial.

    doing: phase of the process that was killed
    who: "process", "rank 0" or "both ranks"
    redone: number of logged steps that were computed again
    survived_s: seconds that the other rank lived on, if the ranks had connected
    """

    doing: str
    resumed: bool
    who: str
    redone: int = 0
    survived_s: float = 0.0


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


def kill_trial(course: Course, draw: random.Random) -> list[Kill]:
    """Kill a run up to TIMES times and resume it; return the kills that hit.

    course: kind of training
    draw: random numbers
    """
    run, kills, logged = course.new_run(), [], 0
    for _ in range(TIMES):
        resumed = (run / "config.json").is_file()
        victims, counter = next(course.victims), next(course.aims[resumed])
        calls = course.calls[resumed][victims[0]].get(counter, 0)
        calls //= 1 if counter == "opening" else 2  # rather a save that comes soon
        die_at = (counter, draw.randint(1, calls)) if calls else ("", 0)
        children = course.launch(run, {victims[0]: die_at})
        delay_s = draw.uniform(0, course.life_s)
        try:
            begin = children[0].start
            children[victims[0]].wait(begin + (HANGS_S if calls else delay_s))
            for rank in victims:
                children[rank].send(signal.SIGKILL)
            hit = time.monotonic()
            for child in children:
                child.wait(hit + SURVIVES_S)
            survived_s = time.monotonic() - hit
        finally:
            codes = codes_of(children)
            for child in children:
                child.end()
        calm(children, run)
        redone = steps_redone(children, logged, run)
        if kills:
            kills[-1].redone = max(kills[-1].redone, redone)
        logged = max(logged, last_step(run))
        if codes == [0] * course.size:
            break
        killed = [r for r, code in enumerate(codes) if code == -signal.SIGKILL]
        expect(bool(killed) and set(killed) <= set(victims), f"ended with {codes}", run)
        dead = children[killed[0]].board
        who = "process" if course.size == 1 else f"rank {killed[0]}"
        if len(killed) == course.size > 1:
            who = "both ranks"
        kills.append(Kill(dead.doing, resumed, who))
        if who[:4] == "rank":
            other, met = children[1 - killed[0]], all(child.board.met for child in children)
            kills[-1].survived_s = survived_s if met else 0.0
            good = {7} if met else {4, 7}
            good |= {0} if dead.doing in ("ending", "leaving") else set()
            expect(other.code in good, f"{who} killed in {dead.doing}: {codes}", run)
    children = course.go_on(run)
    redone = steps_redone(children, logged, run)
    if kills:
        kills[-1].redone = max(kills[-1].redone, redone)
    return kills


def codes_of(children: list[Child]) -> list[int | None]:
    """Return the exit codes of the processes so far."""
    return [child.code for child in children]


def steps_redone(children: list[Child], logged: int, run: Path) -> int:
    """Return the number of logged steps that are computed again, at most one save interval.

    children: the processes
    logged: last logged step before the kill
    run: folder of the run
    """
    first = children[0].board.first
    redone = logged - first if first >= 0 else 0
    expect(0 <= redone <= EVERY, f"step {logged} was logged, and it goes on from {first}", run)
    return redone


def stop_trial(course: Course, draw: random.Random) -> list[str]:
    """Ask a run to end at a random moment, perhaps twice at once, and resume it.

    Of several ranks one receives the signal, in its loop.

    course: kind of training
    draw: random numbers
    Returns what the process was doing, or None if it had ended by itself.
    """
    run, number = course.new_run(), draw.choice([signal.SIGTERM, signal.SIGINT])
    children = course.launch(run)
    asked, twice = draw.choice(children), draw.random() < 0.3
    try:
        if course.size > 1:
            goal = draw.randrange(STEPS)
            while (asked.board.first < 0 or asked.board.step < goal) and asked.code is None:
                time.sleep(0.002)
            asked.wait(time.monotonic() + draw.uniform(0, course.life_s / STEPS))
        else:
            asked.wait(asked.start + draw.uniform(0, 0.9 * course.life_s))
            while not asked.board.begun and asked.code is None:
                time.sleep(0.001)
        if asked.code is not None:
            return []
        doing, step, looped = asked.board.doing, asked.board.step, asked.board.first >= 0
        asked.send(number)
        if twice:
            time.sleep(draw.uniform(0, 0.03))
            asked.send(number)
        for child in children:
            child.wait(time.monotonic() + SURVIVES_S)
    finally:
        codes = codes_of(children)
        for child in children:
            child.end()
    calm(children, run)
    good = {128 + number} | (set() if looped or number == signal.SIGINT else {-number})
    told = f"stopped by {number.name} at step "
    if step >= STEPS - 1:  # perhaps it had all been done
        good |= {0, -number}
    if twice and told in children[0].said:  # perhaps the handlers were already restored
        good.add(-number)
    mine = codes[children.index(asked)]
    expect(mine in good, f"{number.name} while {doing} at step {step}: {codes}", run)
    if looped:
        expect(len(set(codes)) == 1, f"the ranks ended with {codes}", run)
        newest, logged = max(RunFolder(run).checkpoints(), default=0), last_step(run)
        expect(newest == logged >= step, f"step {logged} is not saved, but {newest}", run)
        told += f"{newest}, which is saved"
        expect(mine in (0, -number) or told in children[0].said, "it does not say so", run)
    course.go_on(run, also=max(RunFolder(run).checkpoints(), default=0))
    return [doing + (", twice" if twice else "")]


def impatient_trial(course: Course, number: signal.Signals) -> float:
    """Send a second signal during a slow save; return the seconds until the process has ended.

    course: kind of training
    number: the signal
    """
    run = course.new_run()
    (child,) = course.launch(run, slow_save_s=30.0)
    try:
        while child.board.doing != "saving" and child.code is None:
            time.sleep(0.002)
        child.send(number)
        child.wait(time.monotonic() + 1.5)  # sooner it might be the same one, passed on
        expect(child.code is None, f"the first signal ended it with {child.code}", run)
        child.send(number)
        begin = time.monotonic()
        child.wait(begin + 10)
        ended_s = time.monotonic() - begin
        expect(child.code == 128 + number, f"the second signal: {child.code}", run)
    finally:
        child.end()
    course.go_on(run)
    return ended_s
