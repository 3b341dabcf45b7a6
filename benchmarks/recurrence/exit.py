"""Experiment 4 of recurrent depth: early exit on the register machine.

    python benchmarks/recurrence/exit.py RUN [RUN ...]      runs of register.py

Measures for each run the accuracy at fixed recurrences and under exit rules, on mixed sequences
(number of hops and position are independent), with all tokens read at once. Threshold and patience
of each rule are chosen on the validation part. Candidates keep 99.5 % of the accuracy of the
deepest recurrence, and take at most a third of the iterations of the smallest recurrence that keeps
it. Of these the one is chosen whose exits correlate most with hops. If there are none, it is the
rule with the fewest iterations. The table is of the test part. Writes exit.json and exit.md into
this folder.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
sys.path.insert(0, str(HERE))

from register import load_tasks

from minillm.checkpoint.find import load_run
from minillm.config.sampling import ExitRule
from minillm.inference.early_exit import read

MOST, COUNT, KEPT = 48, 512, 0.995
FIXED = (1, 2, 4, 6, 9, 12, 18, 24, 36, 48)
RULES = {
    "confidence": [
        ExitRule("confidence", t, p) for t in (0.9, 0.99, 0.999, 0.9999) for p in (0, 1, 2, 3, 4)
    ],
    "kl": [ExitRule("kl", t, p) for t in (5e-3, 5e-4, 5e-5) for p in (0, 1, 3)],
    "latent": [ExitRule("latent", t, p) for t in (0.3, 0.1, 0.03, 0.01) for p in (0, 1, 3)],
}


def main() -> None:
    """Evaluate all runs and write the results."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="+", type=Path)
    torch.set_num_threads(1)
    tasks = load_tasks()
    parts = {
        part: tuple(map(torch.from_numpy, tasks.sequences(tasks.register(), part, COUNT)))
        for part in ("val", "test")
    }
    found = []
    for run in p.parse_args().runs:
        model, _, _ = load_run(run)
        fixed = {r: fixed_accuracy(model, parts["test"], r) for r in FIXED}
        deepest = fixed_accuracy(model, parts["val"], MOST)
        enough = [r for r in FIXED if fixed_accuracy(model, parts["val"], r) >= KEPT * deepest]
        row = {"run": run.name, "fixed": fixed, "rules": {}}
        for by, rules in RULES.items():
            judged = [(judge(model, parts["val"], rule), rule) for rule in rules]
            good = [(j, r) for j, r in judged if j["accuracy"] >= KEPT * deepest]
            cheap = [(j, r) for j, r in good if j["iterations"] <= enough[0] / 3]
            best = min(good or judged, key=lambda x: x[0]["iterations"])[1]
            if cheap:
                best = max(cheap, key=lambda x: x[0]["spearman"])[1]
            words = {"threshold": best.threshold, "patience": best.patience, "held": bool(good)}
            row["rules"][by] = {**words, **judge(model, parts["test"], best)}
            print(run.name, by, row["rules"][by], flush=True)
        found.append(row)
    (HERE / "exit.json").write_text(
        json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    (HERE / "exit.md").write_text(table(found), encoding="utf-8")


@torch.no_grad()
def fixed_accuracy(model, part, r: int) -> float:
    """Return the share of right answers at a fixed recurrence.

    model: the model
    part: tokens, answers and hops
    r: number of iterations
    """
    tokens, answers, _ = part
    hits = [model.logits(model.trunk(x, recurrence=r)).argmax(-1) == y
            for x, y in zip(tokens.split(128), answers.split(128), strict=True)]  # fmt: skip
    return round(float(torch.cat(hits).float().mean()), 5)


def judge(model, part, rule: ExitRule) -> dict[str, float]:
    """Return accuracy, mean iterations, accuracy from 16 hops on, and correlation of exit and hops.

    model: the model
    part: tokens, answers and hops
    rule: rule of early exit
    """
    tokens, answers, hops = part
    read_all = [read(model, x, rule, MOST) for x in tokens.split(128)]
    hit = torch.cat([z.argmax(-1) for z, _ in read_all]) == answers
    steps = torch.cat([s for _, s in read_all])
    deep = hit[hops >= 16].float().mean()
    return {
        "accuracy": round(float(hit.float().mean()), 5),
        "iterations": round(float(steps.float().mean()), 3),
        "accuracy_from_16_hops": round(float(deep), 4),
        "spearman": round(spearman(steps.flatten(), hops.flatten()), 4),
    }


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return Spearman's rank correlation; equal values have the mean of their ranks.

    a, b: (n,) values
    """
    places = []
    for x in (a, b):
        _, which, counts = x.unique(sorted=True, return_inverse=True, return_counts=True)
        ends = counts.cumsum(0).double()
        places.append((ends - (counts.double() - 1) / 2)[which])
    return float(torch.corrcoef(torch.stack(places))[0, 1])


def table(found: list[dict]) -> str:
    """Return the results as Markdown."""
    lines = ["| run | rule | threshold | patience | iterations | accuracy | from 16 hops "
             "| Spearman | fewest fixed iterations as accurate | ratio |",
             "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for row in found:
        for by, rule in row["rules"].items():
            as_good = [r for r in FIXED if row["fixed"][r] >= rule["accuracy"] - 1e-9]
            fixed = as_good[0] if as_good else MOST
            lines.append(
                f"| {row['run']} | {by} | {rule['threshold']:g} | {rule['patience']} | "
                f"{rule['iterations']:.2f} | {100 * rule['accuracy']:.2f} | "
                f"{100 * rule['accuracy_from_16_hops']:.1f} | {rule['spearman']:.3f} | {fixed} | "
                f"{fixed / rule['iterations']:.2f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
