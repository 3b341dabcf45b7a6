"""Trainings killed at random instants, or asked to end, and what becomes of them.

    python benchmarks/reliability/kill.py 200 50 20

So many kills (SIGKILL) of a single process, of one or both of two ranks, and so many signals to end
(SIGTERM, SIGINT). A trial is one run: its process is killed again and again, up to four times, and
gone on with by --resume alone, until it is through. Half of the kills come at any moment of the
process's life, by the clock; the others at one of the system's calls,
before the loop, or in saving and pruning, all as likely. Then the losses, as they are written, and the bits of all tensors of every
checkpoint must be those of a run that nobody disturbed. Prints tables.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from killing import PHASES, Child, last_step, place_of, traces  # noqa: E402

from minillm.runs import checkpoints_of  # noqa: E402
from tests.processes import free_port  # noqa: E402

TIMES = 4  # that a run is killed at most
EVERY = 2  # steps from save to save
SURVIVES_S, HANGS_S = 20.0, 120.0  # a rank without the other; any process
STEPS = 12
# How a process is killed: by the clock, or at a call before the loop, or in saving and pruning.
AIMS, WEIGHTS = ("", "opening", "saving"), (30, 12, 58)
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
    """doing: what the process that was hit was doing.    who: "process", "rank 0", "both ranks".
    redone: steps that had been logged.    survived_s: how long a rank went on without the other.
    """

    doing: str
    resumed: bool
    who: str
    redone: int = 0
    survived_s: float = 0.0


class Course:
    """One kind of training: how to start it, and what it comes to when nobody disturbs it."""

    def __init__(self, place: Path, kind: str, size: int) -> None:
        self.place, self.kind, self.size, self.trials = place, kind, size, 0
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
        # Calls there are to be killed at, for each rank: [launch is a resumption][counter].
        self.calls = [
            [{name: getattr(child.board, name) for name in ("opening", "saving")} for child in each]
            for each in (whole, resumed)
        ]

    def new_run(self) -> Path:
        """Where the next run will be, beside the text it prepares for itself."""
        self.trials += 1
        place = Path(tempfile.mkdtemp(dir=self.place))
        return place / "run"

    def launch(self, run: Path, die_at: dict[int, tuple] | None = None, **more: Any) -> list[Child]:
        """The processes of a launch: the first command, or --resume alone if there is a run."""
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

    def go_on(self, run: Path) -> list[Child]:
        """Go on with a run to its end, undisturbed; it must be as if it always had been."""
        children = self.launch(run)
        ended(children, run)
        left = [p for p in run.parent.rglob("*") if p.name.endswith(".tmp")]
        expect(not left, f"left: {left}", run)
        found = traces(run)
        for what, other in self.traces.items():  # one more checkpoint may have escaped pruning
            one = found.get(what)
            expect(one == other, f"{what} is {one}, undisturbed {other}", run)
        return children


def ended(children: list[Child], run: Path) -> float:
    """The seconds until all have ended, as they should."""
    try:
        codes = [child.wait(child.start + HANGS_S) for child in children]
    finally:
        for child in children:
            child.end()
    expect(set(codes) == {0}, f"undisturbed, it ended with {codes}", run)
    return time.monotonic() - children[0].start


def expect(good: bool, why: str, run: Path) -> None:
    """Raise AssertionError, with the last lines that every process of the run said."""
    said = "" if good else "\n".join(
        f"{log.name}: {log.read_text()[-400:]}" for log in sorted(run.parent.glob("log-*"))
    )  # fmt: skip
    if not good:
        raise AssertionError(f"{run}: {why}\n{said}")


def calm(children: list[Child], run: Path) -> None:
    """Nothing that they said looks like a bug, or like a checkpoint that was not whole."""
    for child in children:
        for sign in ("Traceback", "bug in minillm", "Exception ignored", "going on from step"):
            expect(sign not in child.said, f"said {sign!r}", run)


def kill_trial(course: Course, draw: random.Random) -> list[Kill]:
    """A run that is killed up to TIMES times and gone on with; the kills that hit."""
    run, kills, logged = course.new_run(), [], 0
    for _ in range(TIMES):
        resumed = (run / "config.json").is_file()
        victims = draw.choice([[0], [1], [0, 1]]) if course.size > 1 else [0]
        delay_s, counter = draw.uniform(0, course.life_s), draw.choices(AIMS, WEIGHTS)[0]
        most = course.calls[resumed][victims[0]].get(counter, 1)
        at = draw.randint(1, max(1, most if counter == "opening" else most // 2))
        children = course.launch(run, {victims[0]: (counter, at)})
        try:
            begin = children[0].start
            children[victims[0]].wait(begin + (HANGS_S if counter else delay_s))
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
        kills.append(Kill(dead.doing, resumed, who, 0, survived_s if who[:4] == "rank" else 0.0))
        if who[:4] == "rank":
            other = children[1 - killed[0]]
            good = {7} if other.board.met and dead.met else {4, 7}
            good |= {0} if dead.doing in ("ending", "leaving") else set()
            expect(other.code in good, f"{who} was killed, the ranks ended with {codes}", run)
    children = course.go_on(run)
    calm(children, run)
    redone = steps_redone(children, logged, run)
    if kills:
        kills[-1].redone = max(kills[-1].redone, redone)
    return kills


def codes_of(children: list[Child]) -> list[int | None]:
    """How they have ended, so far."""
    return [child.code for child in children]


def steps_redone(children: list[Child], logged: int, run: Path) -> int:
    """How many steps that were logged the loop does again; at most those from save to save."""
    first = children[0].board.first
    redone = logged - first if first >= 0 else 0
    expect(0 <= redone <= EVERY, f"step {logged} was logged, and it goes on from {first}", run)
    return redone


def stop_trial(course: Course, draw: random.Random) -> str:
    """A run that is asked to end at any moment (of several ranks one is, in its loop), perhaps
    twice, and gone on with; what it was doing.
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
    if twice and told in children[0].said:  # perhaps nobody listened any more
        good.add(-number)
    mine = codes[children.index(asked)]
    expect(mine in good, f"{number.name} while {doing} at step {step}: {codes}", run)
    if looped and not twice:
        expect(len(set(codes)) == 1, f"the ranks ended with {codes}", run)
        newest, logged = max(checkpoints_of(run), default=0), last_step(run)
        expect(newest == logged >= step, f"step {logged} is not saved, but {newest}", run)
        told += f"{newest}, which is saved"
        expect(mine in (0, -number) or told in children[0].said, "it does not say so", run)
    calm(course.go_on(run), run)
    return doing + (", twice" if twice else "")


def impatient_trial(course: Course, number: signal.Signals) -> float:
    """A save takes long, and a second signal comes: seconds until the process has ended."""
    run = course.new_run()
    (child,) = course.launch(run, slow_save_s=30.0)
    try:
        while child.board.doing != "saving" and child.code is None:
            time.sleep(0.002)
        child.send(number)
        child.wait(time.monotonic() + 0.5)
        expect(child.code is None, f"the first signal ended it with {child.code}", run)
        child.send(number)
        begin = time.monotonic()
        child.wait(begin + 10)
        ended_s = time.monotonic() - begin
        expect(child.code == 128 + number, f"the second signal: {child.code}", run)
    finally:
        child.end()
    calm(course.go_on(run), run)
    return ended_s


def codes_of(children: list[Child]) -> list[int | None]:
    """How they have ended, so far."""
    return [child.code for child in children]


def repeated(
    courses: list[Course], enough: Callable[[list], bool], trial: Callable[[Course], list]
) -> tuple[list, int]:
    """What trials of each of the courses in turn gave, until it is enough; and how many failed."""
    found, failed, n = [], 0, 0
    while not enough(found) and failed < 10:
        try:
            found += trial(courses[n % len(courses)])
        except AssertionError as error:
            print(error, file=sys.stderr)
            failed += 1
        n += 1
    return found, failed


def table(kills: dict[str, list[Kill]]) -> str:
    """What was hit, how often, in Markdown; a column for each kind of launch."""
    hits = {name: Counter(k.doing for k in found) for name, found in kills.items()}
    rows = [["the process was", *kills]]
    rows += [[doing, *(count[doing] for count in hits.values())] for doing in PHASES]
    rows.append(["kills", *(len(found) for found in kills.values())])
    rows.append(["of them in saving", *(f"{in_saving(found):.0%}" for found in kills.values())])
    rows.append(
        ["of a process that had resumed", *(sum(k.resumed for k in f) for f in kills.values())]
    )
    rows.append(["steps redone, at most", *(max(k.redone for k in f) for f in kills.values())])
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def in_saving(kills: list[Kill]) -> float:
    """The share of kills that came while a checkpoint was written."""
    return sum(k.doing == "saving" for k in kills) / max(1, len(kills))


def main() -> None:
    """Kill, go on, compare, print."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("kills", type=int, nargs="?", default=200, help="of a single process")
    p.add_argument("kills_of_two", type=int, nargs="?", default=50, help="of one or both of two")
    p.add_argument("stops", type=int, nargs="?", default=20, help="signals to end; of two: a third")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", action="store_true", help="print all that was found instead")
    args = p.parse_args()
    begin, draw, failed = time.monotonic(), random.Random(args.seed), 0
    kills, stops, ended_s = {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        for size, many, signals in ((1, args.kills, args.stops),
                                    (2, args.kills_of_two, args.stops // 3)):  # fmt: skip
            name = "one process" if size == 1 else "two ranks"
            wanted = [kind for kind in KINDS[size] if many or signals]
            courses = [Course(Path(folder), kind, size) for kind in wanted]
            for part, count, trial in (
                (kills, many, lambda course: kill_trial(course, draw)),
                (stops, signals, lambda course: [stop_trial(course, draw)]),
            ):
                part[name], bad = repeated(courses, lambda f, n=count: len(f) >= n, trial)
                failed += bad
            if size == 1 and signals:
                numbers = (signal.SIGTERM, signal.SIGINT)
                ended_s = [impatient_trial(courses[0], number) for number in numbers]
    if args.json:
        found = {name: [asdict(k) for k in each] for name, each in kills.items()}
        print(
            json.dumps({"kills": found, "stops": stops, "impatient_s": ended_s, "failed": failed})
        )
    else:
        print(table({name: found for name, found in kills.items() if found}), "\n")
        for name, found in stops.items():
            told = ", ".join(f"{n} {doing}" for doing, n in sorted(Counter(found).items()))
            print(f"Asked to end, {name}: {len(found)} times; it was {told}.")
        slow = max((k.survived_s for k in kills["two ranks"]), default=0)
        print(f"A rank without the other had ended after {slow:.1f} s at most.")
        print(f"{failed} trials failed; {time.monotonic() - begin:.0f} s.")
    sys.exit(failed > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
