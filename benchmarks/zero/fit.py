"""Measure the time of collectives on this machine, and fit a latency and a bandwidth to it.

    torchrun --nproc-per-node 2 benchmarks/zero/fit.py
    torchrun --nproc-per-node 4 benchmarks/zero/fit.py

Each round runs all collectives and sizes in a random order. A time is that of the slowest rank, and
its median over the rounds is fitted. The fit uses sizes up to 25 MiB, the size of a bucket. Every
third size is left out of the fit and shows its error between the points. Writes links.json, which
`python -m minillm plan --links` reads, and links.md into this folder, with an entry for each number
of ranks. gloo's reduce-scatter is an all-reduce inside, hence a separate fit for each collective.
"""

import argparse
import datetime
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from minillm.distributed.ranks import Ranks, connect
from minillm.planning import network as links
from minillm.runtime import ceilings
from minillm.runtime.device import available_threads
from minillm.runtime.launch import launched

KIB = 1024
BUCKET = 25600 * KIB  # 25 MiB, the largest that training sends
SIZES = [n * KIB for n in (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 25600)]
# From this size on the system maps new pages for each buffer (glibc's largest mmap threshold is
# 32 MiB), which takes twice the time unless MALLOC_MMAP_THRESHOLD_ is raised.
BEYOND = [n * KIB for n in (32768, 49152, 65536)]
HELD_OUT = SIZES[1:-1:3]
SMALL = 256 * KIB  # below this several are timed together
TOGETHER = 8


def main() -> None:
    """Measure, fit, print and write."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--out", type=Path, default=HERE / "links.json")
    args = p.parse_args()
    torch.set_num_threads(1)
    ranks = connect(launched(), torch.device("cpu"), timeout_s=300)
    if ranks.size == 1:
        sys.exit("one rank has nobody to send to; start with torchrun --nproc-per-node 2")
    times = measure(ranks, args.rounds)
    if ranks.rank == 0:
        entry = fitted(times, ranks.size)
        print(table(entry, str(ranks.size)), flush=True)
        write(args.out, ranks.size, entry)
    ranks.wait()
    ranks.close()


def operations(ranks: Ranks) -> dict[str, Callable[[int], None]]:
    """Return a function for each collective on n bytes of fp32 zeros, whose sums stay zeros."""
    whole = torch.zeros(max(BEYOND) // 4)
    part = torch.zeros(max(BEYOND) // 4 // ranks.size)

    def all_reduce(n: int) -> None:
        dist.all_reduce(whole[: n // 4])

    def reduce_scatter(n: int) -> None:
        dist.reduce_scatter_tensor(part[: n // 4 // ranks.size], whole[: n // 4])

    def all_gather(n: int) -> None:
        dist.all_gather_into_tensor(whole[: n // 4], part[: n // 4 // ranks.size])

    return {"all_reduce": all_reduce, "reduce_scatter": reduce_scatter, "all_gather": all_gather}


def measure(ranks: Ranks, rounds: int) -> dict[tuple[str, int], list[float]]:
    """Return the seconds of each collective and size by round, each that of the slowest rank.

    The first round is dropped.

    ranks: the ranks
    rounds: number of rounds
    """
    run = operations(ranks)
    cases = [(name, n) for name in run for n in SIZES + BEYOND]
    found: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        random.Random(number).shuffle(cases)  # the same order on all ranks
        for name, n in cases:
            times = TOGETHER if n < SMALL else 1
            ranks.wait()
            start = time.perf_counter()
            for _ in range(times):
                run[name](n)
            seconds = (time.perf_counter() - start) / times
            found[name, n].append(-ranks.minimum(-seconds))
    return {case: seconds[1:] for case, seconds in found.items()}


def fitted(times: dict[tuple[str, int], list[float]], size: int) -> dict:
    """Return the entry of one number of ranks in links.json.

    times: seconds by collective and size
    size: number of ranks
    """
    entry: dict = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load": os.getloadavg()[0],  # ours with it
    }
    for name in links.ROUNDS:
        rows = []
        for n in SIZES + BEYOND:
            low, median, high = quantiles(times[name, n])
            rows.append({"bytes": n, "median_s": median, "p20_s": low, "p80_s": high})
        pairs = [(row["bytes"], row["median_s"]) for row in rows]
        held, beyond = ([p for p in pairs if p[0] in kind] for kind in (HELD_OUT, BEYOND))
        used = [p for p in pairs if p not in held + beyond]
        link = links.fit(name, size, used)
        entry[name] = {
            "alpha_s": link.alpha_s,
            "beta_bytes_per_s": link.bytes_per_s,
            "error": links.error(link, name, size, used),
            "held_out_error": links.error(link, name, size, held),
            "error_beyond_a_bucket": links.error(link, name, size, beyond),
            "rows": rows,
        }
    return entry


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """Return the 20th percentile, the median and the 80th percentile."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return fifths[0], statistics.median(seconds), fifths[3]


def table(entry: dict, ranks: str) -> str:
    """Return the fit as Markdown.

    entry: the entry in links.json
    ranks: number of ranks
    """
    size = int(ranks)
    lines = [
        f"| {size} ranks | alpha us | beta GB/s | error | held out | above 25 MiB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in links.ROUNDS:
        e = entry[name]
        lines.append(
            f"| {name} | {1e6 * e['alpha_s']:.0f} | {e['beta_bytes_per_s'] / 1e9:.2f} | "
            f"{100 * e['error']:.0f} % | {100 * e['held_out_error']:.0f} % | "
            f"{100 * e['error_beyond_a_bucket']:.0f} % |"
        )
    lines += ["", "| collective | KiB | ms, median (p20 to p80) | fitted ms |", "|---|--:|--:|--:|"]
    for name in links.ROUNDS:
        link = links.Link(entry[name]["alpha_s"], entry[name]["beta_bytes_per_s"])
        for row in entry[name]["rows"]:
            n = row["bytes"]
            out = " *" if n in HELD_OUT else " +" * (n > BUCKET)
            predicted = links.ROUNDS[name] * link.ring_s(n, size)
            lines.append(
                f"| {name} | {n // KIB}{out} | {1e3 * row['median_s']:.3f} "
                f"({1e3 * row['p20_s']:.3f} to {1e3 * row['p80_s']:.3f}) | {1e3 * predicted:.3f} |"
            )
    return "\n".join([*lines, "", "* held out of the fit    + above a bucket, not in it either"])


def write(path: Path, size: int, entry: dict) -> None:
    """Add the entry of one number of ranks to links.json, and write links.md.

    path: links.json
    size: number of ranks
    entry: the entry
    """
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"worlds": {}}
    cpu = torch.device("cpu")
    content["machine"] = (
        f"{ceilings.name(cpu)}, {available_threads()} cores, shared; torch "
        f"{torch.__version__}, gloo over loopback, one thread a rank"
    )
    content["worlds"][str(size)] = entry
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(report(content), encoding="utf-8")


def report(content: dict) -> str:
    """Return all of links.json as Markdown."""
    blocks = ["# Latency and bandwidth of collectives", f"{content['machine']}."]
    for ranks in sorted(content["worlds"], key=int):
        entry = content["worlds"][ranks]
        command = f"torchrun --nproc-per-node {ranks} benchmarks/zero/fit.py"
        blocks.append(f"## {ranks} ranks, {entry['date']}, load {entry['load']:.0f}: `{command}`")
        blocks.append(table(entry, ranks))
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    main()
