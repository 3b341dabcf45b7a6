"""Experiment 1 of recurrent depth: the register machine, recurrent against fixed depth.

    python benchmarks/recurrence/register.py [--work runs/register] [--threads 1]

There are three arms: a recurrent model, a model of fixed depth with the same number of stored
parameters, and one of fixed depth with the same FLOPs per token. The learning rate of each arm is
chosen from the same grid by the validation loss with seed 0, and then all seeds are trained. Runs
that exist are not trained again, so the script may be stopped at any time. Writes register.json,
register.md and register.svg into this folder.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from minillm.checkpoint.find import load_run
from minillm.model.gpt import GPT
from minillm.model.size import flops_per_token, n_parameters

STEPS, MEAN, LENGTH = 700, 6, 32
GRID = ("0.0025", "0.005", "0.01", "0.02", "0.04")
SEEDS = (0, 1, 2)
COMMON = (
    "--d-model 64 --n-head 4 --mlp swiglu --qk-norm --rope-base 1000 --optimizer muon "
    "--min-learning-rate 0.0005 --weight-decay 0.01 --schedule wsd --decay-fraction 0.3 "
    "--warmup 50 --batch-size 32 --dtype fp32 --eval-every 0 --log-every 100"
).split()
ARMS = {
    "recurrent": ("--recurrent 1,1,1 --start-state zero --init zero --d-ff 128 "
                  f"--mean-recurrence {MEAN} --max-recurrence {3 * MEAN}").split(),
    "same parameters": "--n-layer 3 --d-ff 142 --init zero".split(),
    "same FLOPs": "--n-layer 8 --d-ff 146 --init zero".split(),
}  # fmt: skip
AT = (1, 2, 4, 6, 9, 12, 18, 24, 36, 48)
HOPS = (1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 31)


def main() -> None:
    """Train the missing runs, evaluate all, and write the results."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--work", type=Path, default=Path("runs/register"), help="folder for the runs")
    p.add_argument("--threads", default="1")
    args = p.parse_args()
    torch.set_num_threads(1)
    corpus = args.work / "corpus"
    if not corpus.is_dir():
        call(ROOT / "data" / "tasks.py", "register", "--out", corpus, "--train", 30000)
    found = train_arms(args, corpus, ARMS, GRID, SEEDS, STEPS, lambda m: {"accuracy": accuracy(m)})
    (HERE / "register.json").write_text(
        json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    (HERE / "register.md").write_text(table(found), encoding="utf-8")
    (HERE / "register.svg").write_text(picture(found), encoding="utf-8")


def load_tasks():
    """Return data/tasks.py as a module."""
    spec = importlib.util.spec_from_file_location("tasks", ROOT / "data" / "tasks.py")
    tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tasks)
    return tasks


def call(script: Path, *words) -> None:
    """Run a script of the checkout, and exit if it fails.

    script: name of the script
    words: its arguments
    """
    subprocess.run([sys.executable, str(script), *map(str, words)], check=True)


def folder(args, arm: str, rate: str, seed: int) -> Path:
    """Return the folder of a run.

    args: the command line
    arm: name of the arm
    rate: learning rate
    seed: random seed
    """
    return args.work / f"{arm.replace(' ', '-')}-{rate}-{seed}"


def train_arms(args, corpus: Path, arms: dict, grid, seeds, steps: int, judge) -> list[dict]:
    """Train each arm at its best learning rate with all seeds, unless a run exists; return results.

    args: the command line
    corpus: folder of the corpus
    arms: flags of each arm by name
    grid: learning rates to choose from
    seeds: random seeds
    steps: number of steps
    judge: function from a model to its results
    """

    def trained(arm: str, rate: str, seed: int) -> float:
        run = folder(args, arm, rate, seed)
        if not (run / "checkpoints" / f"step-{steps:08d}").is_dir():
            words = (*COMMON, *arms[arm], "--learning-rate", rate, "--seed", seed, "--steps", steps)
            where = ("--data", corpus, "--out", run, "--overwrite", "--threads", args.threads)
            call(ROOT / "train.py", *words, *where)
        return last(run, "val_loss")

    found = []
    for arm in arms:
        losses = {rate: trained(arm, rate, 0) for rate in grid}
        best = min(losses, key=lambda rate: losses[rate])
        for seed in seeds:
            trained(arm, best, seed)
            run = folder(args, arm, best, seed)
            model, _, config = load_run(run)
            found.append({
                "arm": arm, "seed": seed, "rate": best, "val_loss_by_rate": losses,
                "parameters": n_parameters(config),
                "train_flops_per_token": flops_per_token(config), "train_s": round(seconds(run)),
                **judge(model),
            })  # fmt: skip
            far = {r: solved(a) for r, a in found[-1]["accuracy"].items()}
            print(arm, best, seed, "solved", far, flush=True)
    return found


def rows(run: Path) -> list[dict]:
    """Return the rows of metrics.jsonl of a run."""
    return [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def last(run: Path, key: str) -> float:
    """Return the last value of a key in metrics.jsonl.

    run: the run
    key: the key
    """
    return [row[key] for row in rows(run) if key in row][-1]


def seconds(run: Path) -> float:
    """Return the training time in seconds, from the logged speeds."""
    timed = [row for row in rows(run) if "step_ms" in row]
    before = [0] + [row["step"] for row in timed]
    return (
        sum((row["step"] - b) * row["step_ms"] for row, b in zip(timed, before, strict=False)) / 1e3
    )


@torch.no_grad()
def accuracy(model: GPT, count: int = 1024) -> dict[int, list[float]]:
    """Return by recurrence (1 for fixed depth) the share of right answers after 0, 1, 2, ... hops.

    Sequences have one set and then operations only, so that hops equal positions. Chance is a
    quarter.

    model: the model
    count: number of sequences
    """
    tasks = load_tasks()
    task = tasks.register(length=LENGTH, chain=True)
    tokens, answers, _ = map(torch.from_numpy, tasks.sequences(task, "test", count))
    right = {}
    for part in range(0, count, 256):
        x, y = tokens[part : part + 256], answers[part : part + 256]
        if model.config.recurrent is None:
            readings = [(1, model.trunk(x), None)]
        else:
            readings = model.readings(x, list(AT))
        for r, h, _ in readings:
            hit = (model.logits(h).argmax(-1) == y).float().sum(0)
            right[r] = right.get(r, 0) + hit
    return {r: [round(float(n) / count, 4) for n in hits] for r, hits in right.items()}


def solved(by_hop: list[float]) -> int:
    """Return the largest number of hops up to which all accuracies are at least 95 %."""
    wrong = np.flatnonzero(np.array(by_hop) < 0.95)
    return int(wrong[0]) - 1 if len(wrong) else len(by_hop) - 1


def mean(found: list[dict], arm: str, r: int) -> list[float]:
    """Return the accuracy by hops, averaged over the seeds.

    found: the results
    arm: name of the arm
    r: number of iterations
    """
    return np.mean([f["accuracy"][r] for f in found if f["arm"] == arm], 0).tolist()


def table(found: list[dict]) -> str:
    """Return the results as Markdown."""
    lines = ["| arm | parameters | GFLOP a token, trained | rate | r | hops solved, by seed | "
             + " | ".join(f"{h}" for h in HOPS) + " |",
             "|---|--:|--:|--:|--:|---|" + "--:|" * len(HOPS)]  # fmt: skip
    for arm in ARMS:
        its = [f for f in found if f["arm"] == arm]
        for r in its[0]["accuracy"]:
            far = ", ".join(str(solved(f["accuracy"][r])) for f in its)
            by_hop = mean(found, arm, r)
            cells = " | ".join(f"{100 * by_hop[h]:.0f}" for h in HOPS)
            gflop = its[0]["train_flops_per_token"] / 1e9
            lines.append(f"| {arm} | {its[0]['parameters']:,} | {gflop:.4f} | {its[0]['rate']} | "
                         f"{r} | {far} | {cells} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def picture(found: list[dict]) -> str:
    """Return an SVG of the mean accuracy by hops (across) and recurrence (down); dark is good."""
    lines = [("recurrent", r) for r in AT] + [(arm, 1) for arm in ARMS if arm != "recurrent"]
    size, left, top = 18, 130, 30
    width, height = left + size * LENGTH + 10, top + size * len(lines) + 30
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
           'font-family="sans-serif" font-size="11">',
           f'<rect width="{width}" height="{height}" fill="white"/>',
           f'<text x="{left}" y="18">register machine: right answers by hops (across) and r '
           "(down), 25 % white to 100 % dark</text>"]  # fmt: skip
    for i, (arm, r) in enumerate(lines):
        y = top + i * size
        name = f"r = {r}" + " (mean of training)" * (r == MEAN) if arm == "recurrent" else arm
        out.append(f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{name}</text>')
        for hop, share in enumerate(mean(found, arm, r)):
            light = 255 - round(200 * max(0.0, (share - 0.25) / 0.75))
            box = f'x="{left + hop * size}" y="{y}" width="{size - 1}" height="{size - 1}"'
            out.append(f'<rect {box} fill="rgb({light},{light},{min(255, light + 40)})"/>')
    for hop in range(0, LENGTH, 4):
        x = left + hop * size + size / 2
        out.append(f'<text x="{x}" y="{height - 12}" text-anchor="middle">{hop}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
