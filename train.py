"""Train a decoder on text: from raw files to a run folder you can sample from.

    python train.py                                  this Python's own source files, two minutes
    python train.py --data my.txt --time-limit 10m   your text, your time
    python train.py --resume                         go on with the newest run

It reads from top to bottom: what to do, on which data, with which model; the loop; the end.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import gcd
from pathlib import Path

import torch

from minillm import checkpoint, errors, runs, startup, world
from minillm.data import Batches
from minillm.gradients import accumulate, clip_factor, compiled, mean_flops, refuse_non_finite
from minillm.meter import Meter
from minillm.microbatch import largest_that_fits, seconds_per_step
from minillm.model import GPT
from minillm.ops import EAGER, select
from minillm.optim import Average, recipes, set_learning_rate
from minillm.pace import Pacer, wished_steps
from minillm.precision import start_scale
from minillm.ranks import Ranks, connected, first_to_say
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
    take_sample,
    worries,
)


def main(argv: Sequence[str]) -> None:
    """Train as the command line says, with the other ranks that torchrun has started."""
    args = startup.command_line(__doc__.split("\n")[0]).parse(argv)
    here = world.launched()
    settings, run = startup.begin(args, here)
    if args.print_config:
        if here.rank == 0:
            print(startup.config_text(settings))
        return
    device = world.pick_device(settings.train.device, here.local_rank if here.size > 1 else None)
    with connected(here, device, settings.train.rank_timeout) as ranks:
        train(settings, run, ranks)


def train(settings: Settings, run: Path | None, ranks: Ranks) -> None:
    """The run from its first step, or from the last checkpoint of `run`, to its end."""
    # On which data.
    config, device = settings.train, ranks.device
    past = checkpoint.open_checkpoint(run, ranks=ranks) if run else None
    corpus = ranks.in_turn(lambda: startup.find_corpus(settings, run, ranks.say))
    shape = startup.fit_to_corpus(settings, corpus)
    startup.require_memory(shape, device)
    batches = Batches(corpus, shape.seq_len, config.batch_size, config.seed, ranks.size)
    rows = startup.rows_of_a_rank(config, ranks.size)

    # With which model.
    fixed = dict(past.state["fixed"]) if past else {}
    threads = fixed["threads"] if past and "threads" not in settings.given else config.threads
    fixed["threads"], why = world.set_threads(
        1 if threads == "auto" and ranks.size > 1 else threads
    )
    dtype = world.pick_dtype(fixed.get("dtype", config.dtype), device, shape.d_model)
    fixed["dtype"] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    ops = select(
        config.kernels, device,
        d_model=shape.d_model, d_head=shape.d_head, vocab_size=shape.vocab_size,
        dropout=shape.dropout,
    )  # fmt: skip
    start = torch.Generator().manual_seed(config.seed)
    model = GPT(shape, ops, dtype, start).to(device).train()
    model.checkpointing = config.activation_checkpointing
    if "micro_batch_size" not in fixed:
        copies = (2 if config.optimizer == "adamw" else 1) + 2 * bool(config.ema)
        fixed["micro_batch_size"] = (
            largest_that_fits(model, rows, device, copies)
            if config.micro_batch_size == "auto"
            else int(config.micro_batch_size)
        )
    fixed["micro_batch_size"] = gcd(rows, int(ranks.least(fixed["micro_batch_size"])))
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
    step_s = ranks.share(seconds_per_step(sharding, rows, fixed["micro_batch_size"], device))
    progress = Progress(**past.state["progress"]) if past else Progress()
    pacer = Pacer(config, wished_steps(config, batches), progress.trained_s, step_s)
    scale = start_scale(dtype)
    plan = pacer.schedule()
    t = Training(run, config, corpus, sharding, None, progress, plan, fixed, scale)
    if past:
        restore(t, past, pacer, settings.given)
        if progress.step >= t.plan.steps:
            ranks.say(f"{run} is finished at step {progress.step}; "
                      f"go on with --resume {run} --steps N")  # fmt: skip
            return
    else:
        t.average = Average(parameters, config.ema) if config.ema else None
        if ranks.rank == 0:
            t.run = runs.make_run(
                config.out, config.preset, config.overwrite or ranks.world.attempt
            )
            facts = startup.facts_of(settings, corpus, ranks.world.launch) | fixed
            runs.write_config(t.run, shape, asdict(config), facts)
            corpus.tokenizer().save(t.run)
    lock = runs.lock(t.run) if ranks.rank == 0 else None
    t.run = Path(ranks.share(str(t.run)))
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
        factor = t.scale.value if t.scale else 1.0
        loss = accumulate(sharding, *batch, fixed["micro_batch_size"], rounds, factor)
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
        if config.time_limit is not None and ranks.size > 1:
            t.plan = replace(t.plan, pace=tuple(map(tuple, ranks.share(t.plan.pace))))

        last = progress.step >= t.plan.steps
        meter.step(tokens.numel() * ranks.size, t.plan.steps, mean_flops(shape, rounds))
        row = {
            "step": progress.step, "tokens": progress.tokens, "loss": float(loss), "lr": rate,
            "grad_norm": float(norm), "peak_memory_mib": peak_mib(device),
        }  # fmt: skip
        if t.scale:
            row["loss_scale"] = factor
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
