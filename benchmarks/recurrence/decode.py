"""Measure the options of recurrent decoding: slot cache, warm start, adaptive exit.

    python benchmarks/recurrence/decode.py RUN [RUN ...] [--recurrence R ...]

The model reads the first half of 32 windows of a run's validation split at once, and the second
half token by token from the cache. For the second half the script reports the loss in nats per
token, and the share of tokens whose most likely prediction is right. Writes decode.md into this
folder.
"""

import argparse
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from minillm.checkpoint.find import load_run
from minillm.checkpoint.run_folder import RunFolder
from minillm.config.sampling import EXIT_DEFAULTS, ExitRule
from minillm.data.batches import evaluation_windows
from minillm.data.shards import open_corpus
from minillm.inference.early_exit import read_next
from minillm.model.gpt import GPT
from minillm.model.recurrence import state_keys

ROWS = 32
WAYS = [
    ("full", False, None), ("slot", False, None), ("full", True, None), ("slot", True, None),
    *(("full", warm, ExitRule(by, *usual)) for by, usual in EXIT_DEFAULTS.items()
      for warm in (False, True)),
]  # fmt: skip


@torch.no_grad()
def main() -> None:
    """Decode in all ways and write the table."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("runs", type=Path, nargs="+")
    p.add_argument("--recurrence", type=int, nargs="+", default=[4, 16])
    args = p.parse_args()
    torch.set_num_threads(1)
    lines = ["| run | r | cache | bytes a token | warm | exit by | iterations | loss | right |",
             "|---|--:|---|--:|---|---|--:|--:|--:|"]  # fmt: skip
    for run in args.runs:
        model, _, config = load_run(run)
        corpus = open_corpus(RunFolder(run).corpus())
        windows = evaluation_windows(corpus, "val", config.seq_len, ROWS)
        tokens, targets = (torch.stack(x) for x in zip(*windows, strict=True))
        for r in args.recurrence:
            for kind, warm, rule in WAYS:
                size, steps, loss, right = decode(model, tokens, targets, r, kind, warm, rule)
                by = f"{rule.by} {rule.threshold:g}, {rule.patience}" if rule else ""
                lines.append(f"| {run.name} | {r} | {kind} | {size:,} | {'yes' * warm} | {by} | "
                             f"{steps:.2f} | {loss:.4f} | {100 * right:.1f} |")  # fmt: skip
                print(lines[-1], flush=True)
    (HERE / "decode.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def decode(model: GPT, tokens, targets, r: int, kind: str, warm: bool, rule: ExitRule | None):
    """Return bytes of cache per token, mean iterations, loss and the share of right predictions.

    model: the model
    tokens, targets: (B, T) int64
    r: number of iterations
    kind: "full" or "slot" cache
    warm: whether a token starts from the last state of the one before it
    rule: rule of early exit, or None
    """
    B, T = tokens.shape
    cache = model.make_cache(B, recurrence=r if kind == "full" else None, warm=warm)
    size = (cache.k.nbytes + cache.v.nbytes) // (B * cache.capacity)
    keys = state_keys(0, torch.arange(B))
    model.trunk(tokens[:, : T // 2], cache, r, keys)
    nats, hits, count, taken = 0.0, 0, 0, []
    for t in range(T // 2, T):
        one, target = tokens[:, t : t + 1], targets[:, t]
        if rule is None:
            logits, steps = model.logits(model.trunk(one, cache, r, keys))[:, 0], [r] * B
        else:
            logits, steps = read_next(model, one, cache, rule, r, keys)
        taken += steps
        nats += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        hits += int((logits.argmax(-1) == target).sum())
        count += int((target != -100).sum())
    return size, sum(taken) / len(taken), nats / count, hits / count


if __name__ == "__main__":
    main()
