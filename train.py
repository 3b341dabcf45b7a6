"""Train a decoder on text: from raw files to a run folder you can sample from.

    python train.py                                  this Python's own source files, two minutes
    python train.py --data my.txt --time-limit 10m   your text, your time
    python train.py --resume                         go on with the newest run

It reads from top to bottom: what to do, on which data, with which model; the loop; the end.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from math import gcd
from pathlib import Path
from typing import TextIO

import torch

from minillm import checkpoint, errors, runs, startup, world
from minillm.agreement import agree, in_turn
from minillm.config import ModelConfig
from minillm.data import Batches
from minillm.gradients import accumulate, clip_factor, compiled, mean_flops, refuse_non_finite
from minillm.meter import Meter
from minillm.microbatch import largest_that_fits, seconds_per_step
from minillm.model import GPT
from minillm.ops import EAGER, select
from minillm.optim import Average, recipes, set_learning_rate
from minillm.pace import Pacer, wished_steps
from minillm.precision import start_scale
from minillm.ranks import Ranks, connected, first_to_say, named
from minillm.recurrence import state_keys
from minillm.settings import Settings
from minillm.sharding import shard
from minillm.training import (
    Progress,
    Training,
    announce,
    judge,
    note_best,
    recurrences,
    restore,
    save,
    share_plan,
    take_sample,
    worries,
)


def main(argv: Sequence[str]) -> None:
    """Train as the command line says, with the other ranks that torchrun has started."""
    args = startup.command_line(__doc__.split("\n")[0]).parse(argv)
    here = named(world.launched())
    settings, run = startup.begin(args, here)
    if args.print_config:
        if here.rank == 0:
            print(startup.config_text(settings))
        return
    local_rank = here.local_rank if here.size > 1 else None
    device = world.pick_device(settings.train.device, local_rank)
    with connected(here, device, settings.train.rank_timeout) as ranks:
        train(settings, run, ranks)


def train(settings: Settings, run: Path | None, ranks: Ranks) -> None:
    """The run from its first step, or from the last checkpoint of `run`, to its end."""
    # On which data.
    config, device = settings.train, ranks.device
    lock = agree(ranks, lambda: take_up(run) if run and ranks.rank == 0 else None)
    past = checkpoint.open_checkpoint(run, ranks=ranks) if run else None
    corpus = in_turn(ranks, "corpus", lambda: startup.find_corpus(settings, run, ranks.say))
    startup.refuse_differences(ranks, corpus, settings, run)
    shape = startup.fit_to_corpus(settings, corpus)
    rows = startup.rows_of_a_rank(config, ranks.size)
    agree(ranks, lambda: startup.require_memory(shape, config, ranks))
    batches = Batches(corpus, shape.seq_len, config.batch_size, config.seed, ranks.size)

    # With which model.
    fixed = dict(past.state["fixed"]) if past else {}
    alike = past and fixed.get("ranks", 1) == ranks.size and "threads" not in settings.given
    threads = fixed["threads"] if alike else config.threads
    threads = "1" if threads == "auto" and ranks.size > 1 else threads
    fixed["threads"], why = world.set_threads(threads)
    dtype = world.pick_dtype(fixed.get("dtype", config.dtype), device, shape.d_model)
    fixed["dtype"] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    ops = select(
        config.kernels, device,
        d_model=shape.d_model, d_head=shape.d_head, vocab_size=shape.vocab_size,
        dropout=shape.dropout,
    )  # fmt: skip
    start = torch.Generator().manual_seed(config.seed)
    cut = config.zero == 3 and ranks.size > 1  # it may fit no device whole
    model = GPT(shape, ops, dtype, start).to("cpu" if cut else device).train()
    model.checkpointing = config.activation_checkpointing
    if "micro_batch_size" not in fixed:
        copies = (2 if config.optimizer == "adamw" else 1) + 2 * bool(config.ema)
        copies /= ranks.size if config.zero else 1
        found = config.micro_batch_size
        if found == "auto" and cut and device.type == "cuda":
            found = 1  # whole, the model may not fit there to be tried
        elif found == "auto":
            fits = partial(largest_that_fits, model, rows, device, copies, ranks.world.local_size)
            found = agree(ranks, fits)
        fixed["micro_batch_size"] = int(ranks.least(int(found)))
    fixed["ranks"], micro = ranks.size, gcd(rows, fixed["micro_batch_size"])
    if config.init_from and not past:
        checkpoint.open_checkpoint(Path(config.init_from)).load_into(model)
    parameters = dict(model.named_parameters())
    wanted = recipes(
        config.optimizer, parameters, model.matrices(), EAGER if config.offload else ops,
        (config.beta1, config.beta2), config.weight_decay, dtype, model.undecayed(),
    )  # fmt: skip
    forward = compiled(model, whole=ranks.size == 1) if config.compile else model
    sharding = shard(
        model, wanted, ranks, config.zero, dtype=dtype, offload=config.offload, forward=forward
    )

    # From where, and for how long.
    step_s = ranks.share(seconds_per_step(sharding, rows, micro, device))
    progress = Progress(**past.state["progress"]) if past else Progress()
    pacer = Pacer(config, wished_steps(config, batches), progress.trained_s, step_s)
    scale = start_scale(dtype)
    t = Training(
        run, config, corpus, sharding, None, progress, pacer.schedule(), fixed, micro, scale
    )
    if past:
        restore(t, past, pacer, settings.given)
    share_plan(t)
    if past:
        if progress.step >= t.plan.steps:
            ranks.say(f"{run} is finished at step {progress.step}; "
                      f"go on with --resume {run} --steps N")  # fmt: skip
            return
    else:
        t.average = Average(parameters, config.ema) if config.ema else None
        agree(ranks, lambda: begin_run(t, settings, shape) if ranks.rank == 0 else None)
    t.run = Path(ranks.share(str(t.run)))
    agree(ranks, lambda: runs.require_shared(t.run))
    lock = agree(ranks, lambda: lock or runs.lock(t.run) if ranks.rank == 0 else None)
    for line in announce(t, batches, step_s, why, device):
        ranks.say(line)

    # The loop.
    meter = Meter(
        t.run / "metrics.jsonl" if ranks.rank == 0 else None, progress.step, t.plan.steps,
        shape.flops_per_token(), ranks.size * world.measured_peak_flops(device, dtype),
    )  # fmt: skip
    while progress.step < t.plan.steps:
        rate = t.plan.learning_rate(progress.step)
        set_learning_rate(sharding.optimizers, rate)
        if shape.dropout:  # a function of the step, so that a resumed run drops the same
            seed = config.seed * 1_000_003 + progress.step + 998_244_353 * ranks.rank
            torch.manual_seed(seed % 2**63)
        tokens, targets = batches.batch(progress.step, ranks.rank)
        rounds = recurrences(t)
        first = progress.step * config.batch_size + ranks.rank * rows
        keys = state_keys(config.seed, torch.arange(first, first + rows))
        batch = (x.to(device) for x in (tokens, targets, keys))
        factor = t.scale.value / sharding.weight if t.scale else 1.0
        loss = accumulate(sharding, *batch, micro, rounds, factor)
        norm = sharding.squares().sqrt().float() / factor
        overflowed = t.scale is not None and not torch.isfinite(norm)
        if t.scale:
            t.scale.update(overflowed, progress.step)
        if overflowed:
            sharding.drop()
        else:
            refuse_non_finite(progress.step, loss, norm)
            sharding.step(clip_factor(norm, config.grad_clip, factor))
        progress.step += 1
        progress.tokens += tokens.numel() * ranks.size
        if t.average:
            t.average.update(progress.step)
        progress.trained_s = pacer.trained_s
        t.plan = pacer.keep_to_time(t.plan, progress.step)
        if config.time_limit is not None:
            share_plan(t)

        last = progress.step >= t.plan.steps
        meter.step(tokens.numel() * ranks.size, t.plan.steps, mean_flops(shape, rounds))
        row = {
            "step": progress.step, "tokens": progress.tokens, "loss": float(loss), "lr": rate,
            "grad_norm": float(norm), "peak_memory_mib": peak_mib(device),
        }  # fmt: skip
        if t.scale:
            row["loss_scale"] = factor * sharding.weight
        if shape.recurrent:
            row["recurrence"] = sum(rounds) / len(rounds)
        improved = False
        if due(config.eval_every, progress.step) and not last:
            with meter.paused():
                row |= judge(t, config.eval_batches)
                for line in worries(t, row):
                    meter.say(line)
            improved = note_best(progress, row)
        if due(config.log_every, progress.step) or last or "val_loss" in row:
            meter.log(row)
        with meter.paused():
            if due(config.sample_every, progress.step) and not last and (text := take_sample(t)):
                meter.say(text)
            if due(config.save_every, progress.step) and not last or improved and config.keep_best:
                save(t)
        if "val_loss" in row and 0 < config.early_stop <= progress.evaluations_without_gain:
            meter.say(f"stopping early: {config.early_stop} evaluations without gain")
            break

    # The end. Which checkpoint is best is judged on the same part of the split all along.
    row = {"step": progress.step, "tokens": progress.tokens}
    row |= judge(t, config.final_eval_batches)
    for line in worries(t, row):
        meter.say(line)
    same = not config.eval_every or config.eval_batches == config.final_eval_batches
    note_best(progress, row if same else judge(t, config.eval_batches))
    meter.log(row)
    meter.close()
    save(t)
    if text := take_sample(t):
        print(text)
    ranks.say(farewell(t, row))
    if lock:
        lock.close()


def begin_run(t: Training, settings: Settings, shape: ModelConfig) -> None:
    """Make the run's folder and write what it is."""
    c, launch = t.config, t.ranks.world.launch
    t.run = runs.make_run(c.out, c.preset, c.overwrite, launch)
    facts = startup.facts_of(settings, t.corpus, launch) | t.fixed
    runs.write_config(t.run, shape, asdict(c), facts)
    t.corpus.tokenizer().save(t.run)


def take_up(run: Path) -> TextIO | None:
    """Lock a run that is resumed, and take away what a killed process left in it."""
    lock = runs.lock(runs.require_run(run))
    checkpoint.tidy(run)
    return lock


def due(every: int, step: int) -> bool:
    """Whether something that happens `every` so many steps (0: never) happens after `step`."""
    return every > 0 and step % every == 0


def peak_mib(device: torch.device) -> float | None:
    """Peak memory of this process in MiB, where the system says."""
    peak = world.peak_memory(device)
    return None if peak is None else peak / 2**20


def farewell(t: Training, row: dict) -> str:
    """What came out, and what to type next."""
    p = t.progress
    lines = [f"{t.run}: step {p.step:,}, {p.tokens:,} tokens, {p.trained_s:.0f} s of training"]
    if "val_loss" in row:
        loss, bpb = row["val_loss"], row["val_bpb"]
        lines.append(f"validation: {loss:.4f} nats a token, {bpb:.4f} bits a byte")
    lines.append(f"sample it:  python sample.py {t.run}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(errors.run("train.py", main, sys.argv[1:], first_to_say))
