"""Experiment 3 of recurrent depth: text, recurrent against fixed depth.

    python benchmarks/recurrence/text.py [--work runs/text] [--steps 200]

The default corpus, equally many tokens: a recurrent model (nano-recurrent), fixed depth of as many
stored parameters (nano), fixed depth of as many FLOPs a token. Each arm's rate from the same grid,
by validation loss. What is there already is not trained again. Writes text.json and text.md beside
itself.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
sys.path.insert(0, str(HERE))

from register import ROOT, call, last, rows, seconds  # noqa: E402

from minillm.checkpoint import load_run  # noqa: E402

GRID = ("0.01", "0.02", "0.05", "0.1", "0.2")
ARMS = {
    "recurrent": ["--preset", "nano-recurrent"],
    "recurrent, parcae": ["--preset", "nano-recurrent", "--recurrence-style", "parcae"],
    "same parameters": ["--preset", "nano"],
    "same FLOPs": ["--preset", "nano", "--n-layer", "10"],
}


def main() -> None:
    """Train what is missing, write the results."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--work", type=Path, default=Path("runs/text"))
    p.add_argument("--steps", type=int, default=200)
    args = p.parse_args()
    found = []
    for arm, flags in ARMS.items():
        for rate in GRID:
            run = args.work / f"{arm.replace(',', '').replace(' ', '-')}-{rate}"
            if not (run / "checkpoints" / f"step-{args.steps:08d}").is_dir():
                call(ROOT / "train.py", *flags, "--learning-rate", rate, "--steps", args.steps,
                     "--seed", 0, "--threads", 1, "--eval-every", 0, "--final-eval-batches", 20,
                     "--out", run, "--overwrite")  # fmt: skip
            at_r = [row["val_loss_at_r"] for row in rows(run) if "val_loss_at_r" in row]
            config = load_run(run)[2]
            found.append({
                "arm": arm, "rate": rate, "parameters": config.n_parameters,
                "train_flops_per_token": config.flops_per_token(), "train_s": round(seconds(run)),
                "val_loss": last(run, "val_loss"), "val_loss_at_r": at_r[-1] if at_r else None,
            })  # fmt: skip
            (HERE / "text.json").write_text(json.dumps(found, indent=1) + "\n")
            (HERE / "text.md").write_text(table(found))


def table(found: list[dict]) -> str:
    """The results as Markdown."""
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
