"""Experiment 3 of recurrent depth: text, recurrent against fixed depth.

    python benchmarks/recurrence/text.py [--work runs/text] [--steps 200] [--rate R ...]

Trains on the same number of tokens of the default corpus: recurrent models of both styles, fixed
depth with the same number of stored parameters (nano), and fixed depth with the same FLOPs per
token. The learning rate of each arm is chosen from the same grid by validation loss. Runs that
exist are not trained again. Writes text-STEPS.json and text-STEPS.md into this folder.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
sys.path.insert(0, str(HERE))

from register import ROOT, call, last, rows, seconds

from minillm.checkpoint.find import load_run
from minillm.model.size import flops_per_token, n_parameters

GRID = ("0.01", "0.02", "0.05", "0.1", "0.2")
RECURRENT = ["--preset", "nano", "--recurrent", "1,2,1", "--mean-recurrence", "4"]
ARMS = {
    "parcae": [*RECURRENT, "--recurrence-style", "parcae", "--init", "takase", "--d-ff", "480"],
    "huginn": [*RECURRENT, "--init", "takase", "--d-ff", "480"],
    "same parameters": ["--preset", "nano", "--init", "zero"],
    "same parameters, takase": ["--preset", "nano", "--init", "takase"],
    "same FLOPs, takase": ["--preset", "nano", "--n-layer", "10", "--init", "takase"],
    "same FLOPs": ["--preset", "nano", "--n-layer", "10", "--init", "zero"],
}
FIXED = "--seed 0 --threads 1 --eval-every 0 --final-eval-batches 20".split()


def main() -> None:
    """Train the missing runs and write the results."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--work", type=Path, default=Path("runs/text"))
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--rate", nargs="+", default=GRID, help="the grid, or part of it")
    p.add_argument("--arm", nargs="+", default=tuple(ARMS), choices=tuple(ARMS))
    args = p.parse_args()
    for arm in args.arm:
        for rate in args.rate:
            run = folder(args, arm, rate)
            if not run.is_dir() or not rows(run)[-1].get("val_loss"):
                call(ROOT / "train.py", *ARMS[arm], *FIXED, "--learning-rate", rate,
                     "--steps", args.steps, "--out", run, "--overwrite")  # fmt: skip
            found = [result(args, a, r) for a in ARMS for r in GRID if folder(args, a, r).is_dir()]
            name = f"text-{args.steps}"
            (HERE / f"{name}.json").write_text(
                json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8"
            )
            (HERE / f"{name}.md").write_text(table(found), encoding="utf-8")


def folder(args: argparse.Namespace, arm: str, rate: str) -> Path:
    """Return the folder of a run.

    args: the command line
    arm: name of the arm
    rate: learning rate
    """
    return args.work / f"{args.steps}-{arm.replace(',', '').replace(' ', '-')}-{rate}"


def result(args: argparse.Namespace, arm: str, rate: str) -> dict:
    """Return the results of a run.

    args: the command line
    arm: name of the arm
    rate: learning rate
    """
    run = folder(args, arm, rate)
    at_r = [row["val_loss_at_r"] for row in rows(run) if "val_loss_at_r" in row]
    config = load_run(run)[2]
    return {
        "arm": arm, "rate": rate, "parameters": n_parameters(config),
        "train_flops_per_token": flops_per_token(config), "train_s": round(seconds(run)),
        "val_loss": last(run, "val_loss"), "val_loss_at_r": at_r[-1] if at_r else None,
    }  # fmt: skip


def table(found: list[dict]) -> str:
    """Return the results as Markdown."""
    lines = ["| arm | parameters | MFLOP a token | s | rate | val_loss | at r |",
             "|---|--:|--:|--:|--:|--:|---|"]  # fmt: skip
    for f in found:
        at = "; ".join(f"{r}: {x:.4f}" for r, x in (f["val_loss_at_r"] or {}).items())
        lines.append(
            f"| {f['arm']} | {f['parameters']:,} | {f['train_flops_per_token'] / 1e6:.1f} | "
            f"{f['train_s']} | {f['rate']} | {f['val_loss']:.4f} | {at} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
