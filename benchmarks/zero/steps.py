"""Time a step on several ranks at stages 0 to 3, and compare it with torch and with the plan.

    torchrun --nproc-per-node 2 benchmarks/zero/steps.py [--rounds 15] [--d-model 256]

One model, the same micro-batches, fp32, AdamW. Each round takes one step of each way, and the
results are medians over the rounds. "alone" is a rank's computation without communication, to which
the plan adds the time of the links in links.json, fitted by fit.py. Rank 0 writes steps-RANKS.json
and steps-RANKS.md into this folder.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from minillm.config.train import ModelConfig
from minillm.distributed.ranks import Ranks, connect
from minillm.distributed.strategies import shard
from minillm.model.gpt import GPT
from minillm.model.size import n_parameters
from minillm.ops import EAGER
from minillm.optim.build import recipes, set_learning_rate
from minillm.planning import estimate as plan, network as links
from minillm.runtime.launch import launched
from minillm.training.steps import clip_factor

OURS = {f"stage {s}": s for s in range(4)}


def main() -> None:
    """Build all ways, time their steps in turn, and write the tables."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--d-model", type=int, default=256)
    p.add_argument("--micro-batches", type=int, default=2)
    args = p.parse_args()
    torch.set_num_threads(1)
    ranks = connect(launched(), torch.device("cpu"), 300)
    config = ModelConfig(vocab_size=4096, seq_len=128, n_layer=6, n_head=4, d_model=args.d_model)
    ways = {name: ours(config, ranks, stage, args.micro_batches) for name, stage in OURS.items()}
    ways |= {
        "DDP, fused AdamW": theirs(config, args.micro_batches, sharded=False),
        "DDP, ZeroRedundancyOptimizer": theirs(config, args.micro_batches, sharded=True),
    }
    ways["alone"] = ours(config, Ranks(), 0, args.micro_batches)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name in ways:
            ranks.wait()
            start = time.perf_counter()
            ways[name]()
            ranks.wait()
            if number:  # the first of each pays for what happens once
                times[name].append(time.perf_counter() - start)
    if ranks.rank == 0:
        write(config, ranks.size, args, times)
    ranks.close()


def model_of(config: ModelConfig) -> GPT:
    """Return the model, which is the same on all ranks."""
    return GPT(config, EAGER, torch.float32, torch.Generator().manual_seed(0)).train()


def tokens_of(config: ModelConfig) -> torch.Tensor:
    """Return a micro-batch of random tokens, (2, T) int64."""
    return torch.arange(2 * config.seq_len).view(2, -1) * 7 % config.vocab_size


def ours(config: ModelConfig, ranks: Ranks, stage: int, micro_batches: int) -> Callable[[], None]:
    """Return a function that takes a step as train.py does.

    config: the model
    ranks: the ranks
    stage: ZeRO stage, 0 to 3
    micro_batches: micro-batches of a step
    """
    model, tokens = model_of(config), tokens_of(config)
    parameters = dict(model.named_parameters())
    wanted = recipes("adamw", parameters, model.matrices(), EAGER, (0.9, 0.95), 0.1)
    sharding = shard(model, wanted, ranks, stage)
    set_learning_rate(sharding.optimizers, 1e-4)

    def step() -> None:
        for i in range(micro_batches):
            with sharding.synced(i == micro_batches - 1):
                (sharding.forward(tokens, tokens) / micro_batches).backward()
        sharding.step(clip_factor(sharding.squares().sqrt().float(), 1.0))

    return step


def theirs(config: ModelConfig, micro_batches: int, sharded: bool) -> Callable[[], None]:
    """Return a function that takes a step with DDP and torch's fused AdamW.

    config: the model
    micro_batches: micro-batches of a step
    sharded: whether the optimizer state is sharded
    """
    model, tokens = DistributedDataParallel(model_of(config)), tokens_of(config)
    kind, options = torch.optim.AdamW, {"lr": 1e-4, "fused": True}
    optimizer = (
        ZeroRedundancyOptimizer(model.parameters(), optimizer_class=kind, **options)
        if sharded
        else kind(model.parameters(), **options)
    )

    def step() -> None:
        for _ in range(micro_batches - 1):
            with model.no_sync():
                (model(tokens, tokens) / micro_batches).backward()
        (model(tokens, tokens) / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def write(config: ModelConfig, size: int, args: argparse.Namespace, times: dict) -> None:
    """Write the tables of the times and of the plan's estimates.

    config: the model
    size: number of ranks
    args: the command line
    times: seconds of a step by way
    """
    medians = {name: statistics.median(each) for name, each in times.items()}
    ratio = {
        name: statistics.median(
            a / b for a, b in zip(each, times["DDP, ZeroRedundancyOptimizer"], strict=True)
        )
        for name, each in times.items()
    }
    network = links.read(HERE / "links.json", size)
    job = plan.Job(config, ranks=size, batch_size=2 * args.micro_batches * size, micro_batch=2)
    planned = {
        name: plan.step_time(job, stage, network, medians["alone"]).total_s
        for name, stage in OURS.items()
    }
    lines = [
        f"{n_parameters(config):,} parameters, {args.micro_batches} micro-batches of 2 x "
        f"{config.seq_len} tokens a rank, {size} ranks of one thread, fp32, {args.rounds} rounds",
        "",
        "| way | s, median (p20 to p80) | by DDP + ZeroRedundancyOptimizer | planned s | error |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, each in times.items():
        low, high = statistics.quantiles(each, n=5)[0], statistics.quantiles(each, n=5)[-1]
        said = f"{planned[name]:.3f}" if name in planned else ""
        error = f"{100 * (planned[name] / medians[name] - 1):+.0f} %" if name in planned else ""
        lines.append(
            f"| {name} | {medians[name]:.3f} ({low:.3f} to {high:.3f}) | {ratio[name]:.2f} | "
            f"{said} | {error} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    (HERE / f"steps-{size}.md").write_text(text, encoding="utf-8")
    (HERE / f"steps-{size}.json").write_text(
        json.dumps({"times": times, "planned": planned}, allow_nan=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
