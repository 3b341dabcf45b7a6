"""Count the bytes of a rank by kind, and compare them with the plan's formula, stages 0 to 3.

    torchrun --nproc-per-node 2 benchmarks/zero/memory.py      and with 4

Counts the live tensors of each kind after the second step's backward pass, when gradients, masters
and moments all exist, on the rank that has most. Rank 0 writes memory-RANKS.md into this folder.
"""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from minillm.config.train import ModelConfig
from minillm.distributed.agreement import gather
from minillm.distributed.ranks import connect
from minillm.distributed.strategies import shard
from minillm.model.gpt import GPT
from minillm.model.size import n_parameters
from minillm.ops import EAGER
from minillm.optim.build import recipes, set_learning_rate
from minillm.planning import estimate as plan
from minillm.runtime.device import dtype_name
from minillm.runtime.launch import launched

KINDS = ("parameters", "gradients", "masters", "moments")
CASES = [
    (stage, dtype, optimizer)
    for optimizer in ("adamw", "muon")
    for dtype in (torch.float32, torch.bfloat16)
    for stage in range(4)
    if (stage, optimizer) != (3, "muon")
]


def main() -> None:
    """Take two steps in each case, count, and write the table."""
    torch.set_num_threads(1)
    ranks = connect(launched(), torch.device("cpu"), 300)
    config = ModelConfig(vocab_size=4096, seq_len=64, n_layer=8, n_head=4, d_model=256)
    lines = [f"{n_parameters(config):,} parameters, {ranks.size} ranks; MiB counted (by formula)",
             "", "| optimiser | dtype | --zero | " + " | ".join(KINDS) + " | all | off by |",
             "|---|---|--:|" + "--:|" * (len(KINDS) + 2)]  # fmt: skip
    for stage, dtype, optimizer in CASES:
        found = count(config, ranks, stage, dtype, optimizer)
        job = plan.Job(config, ranks.size, ranks.size, None, dtype.itemsize, optimizer)
        stated = plan.memory(job, stage)
        every = gather(ranks, found)
        most = {kind: max(each[kind] for each in every) for kind in KINDS}
        total, formula = (sum(x[kind] for kind in KINDS) for x in (most, stated))
        cells = [f"{most[k] / 2**20:.2f} ({stated[k] / 2**20:.2f})" for k in KINDS]
        name = dtype_name(dtype)
        off = f"{total / 2**20:.2f} | {100 * (total / formula - 1):+.2f} %"
        lines.append(f"| {optimizer} | {name} | {stage} | " + " | ".join(cells) + f" | {off} |")
    if ranks.rank == 0:
        text = "\n".join(lines) + "\n"
        print(text)
        (HERE / f"memory-{ranks.size}.md").write_text(text, encoding="utf-8")
    ranks.close()


def count(config: ModelConfig, ranks, stage: int, dtype: torch.dtype, optimizer: str) -> dict:
    """Return the bytes of this rank by kind.

    config: the model
    ranks: the ranks
    stage: ZeRO stage, 0 to 3
    dtype: dtype of the weights
    optimizer: "adamw" or "muon"
    """
    model = GPT(config, EAGER, dtype, torch.Generator().manual_seed(0)).train()
    parameters = dict(model.named_parameters())
    wanted = recipes(optimizer, parameters, model.matrices(), EAGER, (0.9, 0.95), 0.0)
    sharding = shard(model, wanted, ranks, stage, dtype=dtype)
    set_learning_rate(sharding.optimizers, 1e-4)
    tokens = torch.arange(config.seq_len)[None]
    for step in range(2):
        with sharding.synced(True):
            sharding.forward(tokens, tokens).backward()
        sharding.squares()
        if step:
            return sharding.bytes()
        sharding.step(None)
    raise AssertionError


if __name__ == "__main__":
    main()
