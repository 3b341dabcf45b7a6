"""Trials for kill.py: kill a training or ask it to end, resume it, and compare the run.

This file decides when to kill which process, and which results must be the same afterwards.
courses.py has the kinds of training, and killing.py starts the processes.
"""

import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from courses import EVERY, HANGS_S, STEPS, Course, calm, expect
from killing import Child, last_step

from minillm.checkpoint.run_folder import RunFolder

TIMES = 4  # largest number of kills of a run
SURVIVES_S = 40.0  # longest life of a rank without the other, met or not


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


def kill_trial(course: Course, draw: random.Random) -> list[Kill]:
    """Kill a run up to TIMES times and resume it; return the kills that hit.

    course: kind of training
    draw: random numbers
    """
    run, kills, logged = course.new_run(), [], 0
    for _ in range(TIMES):
        resumed = (run / "config.json").is_file()
        victims = next(course.victims)
        children, codes, survived_s = _launch_and_kill(course, run, draw, resumed, victims)
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


def _launch_and_kill(
    course: Course, run: Path, draw: random.Random, resumed: bool, victims: list[int]
) -> tuple[list[Child], list[int | None], float]:
    """Launch a run, kill the victims among its ranks, and wait until the others have ended.

    Returns the processes, the exit code of each (None if it had to be killed because it did not
    end), and the seconds from the kill until the last one ended.
    """
    counter = next(course.aims[resumed])
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
    return children, codes, survived_s


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
        _wait_for_a_moment(course, asked, draw)
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


def _wait_for_a_moment(course: Course, asked: Child, draw: random.Random) -> None:
    """Wait until a random moment: of the loop if there are several ranks, or of the whole life."""
    if course.size > 1:
        goal = draw.randrange(STEPS)
        while (asked.board.first < 0 or asked.board.step < goal) and asked.code is None:
            time.sleep(0.002)
        asked.wait(time.monotonic() + draw.uniform(0, course.life_s / STEPS))
    else:
        asked.wait(asked.start + draw.uniform(0, 0.9 * course.life_s))
        while not asked.board.begun and asked.code is None:
            time.sleep(0.001)


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
