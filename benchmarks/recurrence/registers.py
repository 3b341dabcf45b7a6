"""Experiment 2 of recurrent depth: several registers, so that depth and distance differ.

    python benchmarks/recurrence/registers.py [--work runs/registers] [--threads 1]

Three registers are set, or become a permutation of one another (r_i <- g(r_j)). The answer at each
token is the value that it writes, and hops are the writes behind that value. Arms, grid and
resumption are those of register.py. Writes registers.json and registers.md into this folder.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
sys.path.insert(0, str(HERE))

from exit import spearman
from register import ROOT, call, load_tasks, solved, train_arms

from minillm.config.sampling import ExitRule
from minillm.inference.early_exit import read
from minillm.model.gpt import GPT

STEPS, MEAN, LENGTH, REGISTERS = 2500, 6, 48, 3
GRID = ("0.0025", "0.005", "0.01", "0.02")
SEEDS = (0, 1)
ARMS = {
    "recurrent": ("--recurrent 1,1,1 --start-state zero --init zero --d-ff 128 "
                  f"--mean-recurrence {MEAN} --max-recurrence {3 * MEAN}").split(),
    "same parameters": "--n-layer 3 --d-ff 142 --init zero".split(),
    "same FLOPs": "--n-layer 8 --d-ff 146 --init zero".split(),
}  # fmt: skip
AT = (1, 2, 4, 6, 9, 12, 18, 24, 36, 48)
HOPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18)
FEWEST = 100  # tokens of the test part, of a number of hops that is judged
RULES = [ExitRule("confidence", t, p) for t in (0.9, 0.99, 0.999) for p in (0, 1, 2, 3)]


def main() -> None:
    """Train the missing runs, evaluate all, and write the results."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--work", type=Path, default=Path("runs/registers"), help="folder for the runs")
    p.add_argument("--threads", default="1")
    args = p.parse_args()
    torch.set_num_threads(1)
    corpus = args.work / "corpus"
    if not corpus.is_dir():
        call(ROOT / "data" / "tasks.py", "registers", "--out", corpus, "--train", 80000,
             "--registers", REGISTERS, "--length", LENGTH)  # fmt: skip
    found = train_arms(args, corpus, ARMS, GRID, SEEDS, STEPS, judge)
    (HERE / "registers.json").write_text(
        json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    (HERE / "registers.md").write_text(table(found), encoding="utf-8")


def judge(model: GPT) -> dict:
    """Return the results of a model."""
    return {
        "accuracy": accuracy(model),
        "exit": exits(model) if model.config.recurrent else None,
    }


def part(name: str, count: int, chain: bool) -> tuple[torch.Tensor, ...]:
    """Return tokens, answers and hops of one part of the task, (count, LENGTH) int64 each.

    name: "train", "val" or "test"
    count: number of sequences
    chain: whether there is one set and then operations only
    """
    tasks = load_tasks()
    task = tasks.registers(registers=REGISTERS, length=LENGTH, chain=chain)
    return tuple(map(torch.from_numpy, tasks.sequences(task, name, count)))


@torch.no_grad()
def accuracy(model: GPT, count: int = 2048) -> dict[int, list[float]]:
    """Return by recurrence (1 for fixed depth) the share of right answers after 0, 1, 2, ... hops.

    Sequences have one set and then operations only. Chance is a quarter.

    model: the model
    count: number of sequences
    """
    tokens, answers, hops = part("test", count, True)
    enough = int((hops.flatten().clamp(min=0).bincount() >= FEWEST).sum())
    right: dict[int, torch.Tensor] = {}
    for x, y, h in zip(tokens.split(256), answers.split(256), hops.split(256), strict=True):
        if model.config.recurrent is None:
            readings = [(1, model.trunk(x), None)]
        else:
            readings = model.readings(x, list(AT))
        for r, z, _ in readings:
            hit = model.logits(z).argmax(-1) == y
            counted = h[hit & (h >= 0)].bincount(minlength=LENGTH)
            right[r] = right.get(r, 0) + counted
    total = hops[hops >= 0].bincount(minlength=LENGTH)
    return {r: [round(float(n), 4) for n in (k / total)[:enough]] for r, k in right.items()}


def exits(model: GPT) -> dict[str, float]:
    """Return accuracy and iterations of the confidence rule chosen on the validation part.

    The result also has the rank correlations of exits with hops and with positions.
    """
    most, judged = AT[-1], []
    for rule in RULES:
        accuracy, steps, hops, _ = exited(model, "val", rule, most)
        judged.append((accuracy, -float(steps.float().mean()), spearman(steps, hops), rule))
    best = max(j[0] for j in judged)
    rule = max((j for j in judged if j[0] >= 0.995 * best), key=lambda j: j[1])[3]
    accuracy, steps, hops, at = exited(model, "test", rule, most)
    return {
        "threshold": rule.threshold, "patience": rule.patience, "accuracy": round(accuracy, 4),
        "iterations": round(float(steps.float().mean()), 2),
        "spearman_hops": round(spearman(steps, hops), 3),
        "spearman_position": round(spearman(steps, at), 3),
    }  # fmt: skip


def exited(model: GPT, name: str, rule: ExitRule, most: int) -> tuple:
    """Return the accuracy, and iterations, hops and position of each answer, (n,) each.

    model: the model
    name: "val" or "test"
    rule: rule of early exit
    most: largest number of iterations
    """
    tokens, answers, hops = part(name, 512, False)
    pairs = [read(model, x, rule, most) for x in tokens.split(128)]
    hit = torch.cat([z.argmax(-1) for z, _ in pairs]) == answers
    steps, has = torch.cat([s for _, s in pairs]), hops >= 0
    at = torch.arange(LENGTH).expand_as(hops)
    return float(hit[has].float().mean()), steps[has], hops[has], at[has]


def table(found: list[dict]) -> str:
    """Return the results as Markdown."""
    lines = ["| arm | seed | parameters | MFLOP a token, trained | s | rate | r | hops solved | "
             + " | ".join(map(str, HOPS)) + " |",
             "|---|--:|--:|--:|--:|--:|--:|--:|" + "--:|" * len(HOPS)]  # fmt: skip
    for f in found:
        for r, by_hop in f["accuracy"].items():
            cells = " | ".join(f"{100 * by_hop[h]:.0f}" for h in HOPS)
            lines.append(
                f"| {f['arm']} | {f['seed']} | {f['parameters']:,} | "
                f"{f['train_flops_per_token'] / 1e6:.2f} | {f['train_s']} | {f['rate']} | {r} | "
                f"{solved(by_hop)} | {cells} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
