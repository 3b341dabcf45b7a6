"""Kill trainings at random moments, or ask them to end, and compare the runs with undisturbed ones.

    python benchmarks/reliability/kill.py 200 50 20

The arguments are the number of kills (SIGKILL) of a single process, the number of kills of one or
both of two ranks, and the number of signals to end (SIGTERM, SIGINT). A trial is one run. Its
process is killed up to four times and resumed with --resume alone until the run is finished. A
quarter of the kills are timed by the clock, at any moment of the process's life. The others come at
one of the system calls before the loop, or in saving and pruning. At the end the losses in
metrics.jsonl and the bits of all tensors of every checkpoint must be those of an undisturbed run.
Prints tables.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from courses import KINDS, Course
from kill_trials import Kill, impatient_trial, kill_trial, stop_trial
from killing import PHASES


def repeated(
    courses: list[Course], enough: Callable[[list], bool], trial: Callable[[Course], list]
) -> tuple[list, int]:
    """Run trials of each of the courses in turn; return their results and the number of failures.

    courses: kinds of training
    enough: function that decides whether there are enough results
    trial: function that runs one trial of a course
    """
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
    """Return a table in Markdown of the kills by phase, with a column for each kind of launch."""
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
    """Return the share of kills that came while a checkpoint was being written."""
    return sum(k.doing == "saving" for k in kills) / max(1, len(kills))


def main() -> None:
    """Kill, resume, compare and print."""
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
            wanted = KINDS[size][: max(many, signals)]
            courses = [Course(Path(folder), kind, size) for kind in wanted]
            for part, count, trial in (
                (kills, many, lambda course: kill_trial(course, draw)),
                (stops, signals, lambda course: stop_trial(course, draw)),
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
        if any(kills.values()):
            print(table({name: found for name, found in kills.items() if found}), "\n")
        for name, found in stops.items():
            told = ", ".join(f"{n} {doing}" for doing, n in sorted(Counter(found).items()))
            print(f"Asked to end, {name}: {len(found)} times; it was {told}.")
        slow = max((k.survived_s for k in kills["two ranks"]), default=0)
        print(f"A rank that had met the other had ended without it after {slow:.1f} s at most.")
        print(f"{failed} trials failed; {time.monotonic() - begin:.0f} s.")
    sys.exit(failed > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
