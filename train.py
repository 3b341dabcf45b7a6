"""Train a decoder on text: from raw files to a run folder you can sample from.

python train.py                                  this Python's own source files, two minutes
python train.py --data my.txt --time-limit 10m   your text, your time
python train.py --resume                         go on with the newest run
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from math import gcd
from pathlib import Path

from minillm.flags import train as flags
from minillm.runtime import program
from minillm.runtime.launch import answer, launched, shell_command

if __name__ == "__main__":  # help and refusals need no torch, whose import takes seconds
    answer("train.py", flags.parse, sys.argv[1:])

import torch

from minillm.checkpoint import find as checkpoint, placing, write
from minillm.checkpoint.run_folder import RunFolder
from minillm.config.flags import Settings
from minillm.config.resolve import LENGTHS, settings_at_checkpoint
from minillm.distributed.agreement import agree, in_turn
from minillm.distributed.ranks import Ranks, connected, first_to_say, leave, with_launch_name
from minillm.distributed.strategies import shard
from minillm.model.gpt import GPT
from minillm.model.recurrence import state_keys
from minillm.ops import EAGER, select
from minillm.optim import clip, ema
from minillm.optim.build import OPTIMIZERS, recipes, set_learning_rate
from minillm.optim.loss_scale import start_scale
from minillm.runtime import console, device as world
from minillm.training import setup as startup
from minillm.training.budget import Pacer, due, wished_steps
from minillm.training.microbatch import largest_that_fits, seconds_per_step
from minillm.training.recovery import keep, report, roll_back
from minillm.training.samples import show_sample, take_sample
from minillm.training.state import (
    Training,
    heed,
    peak_mib,
    progress_of,
    recurrences,
    replan,
    restore,
    share_plan,
)
from minillm.training.steps import accumulate, compiled, mean_flops
from minillm.training.summary import announce, farewell, meter_of, nothing_left
from minillm.training.validation import findings, judge, note_best
from minillm.training.watchdog import Stopped, Watch


def main(argv: Sequence[str]) -> None:
    """Train as the command line says, with the other ranks that torchrun has started."""
    args = flags.parse(argv)
    here = with_launch_name(launched())
    settings, run = startup.begin(args, here)
    if args.print_config:
        if here.rank == 0:
            print(startup.config_text(settings))
        return
    device = world.pick_device(settings.train.device, here.local_rank if here.size > 1 else None)
    with connected(here, device, settings.train.rank_timeout) as ranks:
        train(settings, run, ranks)


def train(settings: Settings, run: RunFolder | None, ranks: Ranks) -> None:
    """The run from its first step, or from the last checkpoint of `run`, to its end."""
    with ExitStack() as held:
        if run:  # nobody else may write it from here on
            lock = agree(ranks, lambda: write.take_up(run) if ranks.rank == 0 else None)
            held.enter_context(lock or nullcontext())
        with console.busy("reading the text, building the model ...", ranks.rank == 0):
            t = set_up(settings, run, ranks)
        if t.is_done:
            ranks.say(nothing_left(t))
            return t.run
        t.progress.ended = False
        if run is None:
            agree(ranks, lambda: begin_run(held, t, settings) if ranks.rank == 0 else None)
            t.run = Path(ranks.broadcast(str(t.run)))
            agree(ranks, RunFolder(t.run).require_shared)
        for line in announce(t):
            ranks.say(line)
        t.meter = meter_of(t)
        held.callback(t.meter.close)
        with t.watch:
            try:
                if t.asked:  # remembered, if it is killed at once
                    keep(t)
                learn(t)
                finish(t)
            except Stopped as stop:
                keep(t, final=True)
                t.meter.say(f"stopped by {stop} at step {t.progress.step}, which is saved; "
                            f"continue: {shell_command('train', '--resume', t.run)}")  # fmt: skip
                raise SystemExit(128 + stop.signal) from None
        return t.run


def set_up(settings: Settings, run: RunFolder | None, ranks: Ranks) -> Training:
    """All that a run works with, as its last checkpoint has it or as it begins."""
    # On which data.
    begun = run is not None and ranks.broadcast(bool(run.step_folders()))
    past = checkpoint.open_checkpoint(run, ranks=ranks) if begun else None
    if past:  # what it was opened in place of
        agree(ranks, lambda: ranks.rank or write.set_aside(run, past.step))
    device, progress = ranks.device, progress_of(past)
    settings = (
        settings_at_checkpoint(settings, past.state, past.folder, ranks.world.launch)
        if past
        else settings
    )
    config = settings.train
    corpus = in_turn(ranks, "corpus", lambda: startup.find_corpus(settings, run, ranks.say))
    startup.refuse_differences(ranks, corpus, settings, run)
    shape = startup.fit_to_corpus(settings, corpus)
    rows = startup.rows_of_a_rank(config, ranks.size)
    agree(ranks, lambda: startup.require_memory(shape, config, ranks))
    batches = startup.batches_of(run, corpus, shape.seq_len, config, ranks.size)

    # With which model.
    fixed = dict(past.state["fixed"]) if past else run.fixed if run else {}
    alike = run and fixed.get("ranks", 1) == ranks.size and "threads" not in settings.given
    threads = fixed["threads"] if alike else config.threads
    threads = "1" if threads == "auto" and ranks.size > 1 else threads
    fixed["threads"], why_threads = world.set_threads(threads)
    dtype = world.pick_dtype(fixed.get("dtype", config.dtype), device, shape.d_model)
    fixed["dtype"] = world.dtype_name(dtype)
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
        copies = OPTIMIZERS[config.optimizer].matrix_copies + 2 * bool(config.ema)
        copies /= ranks.size if config.zero else 1
        found = config.micro_batch_size
        if found == "auto" and cut and device.type == "cuda":
            found = 1  # whole, the model may not fit there to be tried
        elif found == "auto":
            fits = partial(largest_that_fits, model, rows, device, copies, ranks.world.local_size)
            found = agree(ranks, fits)
        fixed["micro_batch_size"] = int(ranks.minimum(int(found)))
    fixed["ranks"], micro = ranks.size, gcd(rows, fixed["micro_batch_size"])
    if config.init_from and not past:
        checkpoint.while_there(config.init_from, "last", lambda it: it.load_into(model), ranks)
    parameters = dict(model.named_parameters())
    wanted = recipes(
        config.optimizer, parameters, model.matrices(), EAGER if config.offload else ops,
        (config.beta1, config.beta2), config.weight_decay, dtype, model.undecayed(),
    )  # fmt: skip
    if config.compile:
        ranks.say("compile   the model, which can take minutes; the run begins after that")
    forward = compiled(model, whole=ranks.size == 1) if config.compile else model
    sharding = shard(
        model, wanted, ranks, config.zero, dtype=dtype, offload=config.offload, forward=forward
    )

    # From where, and for how long.
    step_s = ranks.broadcast(seconds_per_step(sharding, rows, micro, device))
    pacer = Pacer(config, wished_steps(config, batches), progress.trained_s, step_s)
    t = Training(
        run and run.path, config, corpus, batches, sharding, progress, pacer, pacer.schedule(),
        fixed, micro, Watch(config.hang_timeout, step_s, ranks.say), why_threads,
        start_scale(dtype), asked=settings.given & LENGTHS if run else frozenset(),
    )  # fmt: skip
    if past:
        restore(t, past)
        replan(t, past, settings.given)
    elif config.ema:
        t.average = ema.Average(parameters, config.ema)
    share_plan(t)
    return t


def learn(t: Training) -> None:
    """The loop: step by step to the end of the schedule. Stopped if a signal comes."""
    config, model, ranks, sharding, device = t.config, t.model, t.ranks, t.sharding, t.ranks.device
    rows = config.batch_size // ranks.size
    while t.progress.step < t.plan.steps:
        progress = t.progress  # another one after a roll-back
        rate = t.plan.learning_rate(progress.step)
        set_learning_rate(sharding.optimizers, rate)
        at = progress.position
        if model.config.dropout:  # a function of the step, so that a resumed run drops the same
            seed = config.seed * 1_000_003 + at + 998_244_353 * ranks.rank
            torch.manual_seed(seed % 2**63)
        tokens, targets = t.batches.batch(at, ranks.rank)
        rounds = recurrences(t)
        first = at * config.batch_size + ranks.rank * rows
        keys = state_keys(config.seed, torch.arange(first, first + rows))
        batch = (x.to(device) for x in (tokens, targets, keys))
        factor = t.scale.value / sharding.weight if t.scale else 1.0
        loss = accumulate(sharding, *batch, t.micro, rounds, factor)
        norm = sharding.squares().sqrt().float().to(device) / factor
        row = {
            "step": progress.step + 1, "tokens": progress.tokens + tokens.numel() * ranks.size,
            "loss": float(loss), "lr": rate, "grad_norm": float(norm),
            "peak_memory_mib": peak_mib(device),
        }  # fmt: skip
        if t.scale:
            row["loss_scale"] = factor * sharding.weight
        if model.config.recurrent:
            row["recurrence"] = sum(rounds) / len(rounds)

        # The weights move only if that is safe.
        signs = row["loss"], row["grad_norm"]
        overflowed = t.scale is not None and t.scale.is_to_blame(*signs)
        why = None if overflowed else t.guard.objection(*signs)
        if why:
            t.meter.say(report(t, why, *signs))
        if why or overflowed:
            sharding.drop()
        else:
            sharding.step(clip.clip_factor(norm, config.grad_clip, factor))
            if t.scale:
                t.scale.went_well()
            if t.average:
                t.average.update(progress.step + 1)
        progress.step, progress.tokens = row["step"], row["tokens"]
        progress.trained_s = t.pacer.trained_s
        if t.guard.hopeless:
            t.meter.say(roll_back(t))
            continue
        t.plan = t.pacer.keep_to_time(t.plan, progress.step)
        if config.time_limit is not None:
            share_plan(t)
        flops = mean_flops(model.config, rounds)
        t.meter.step(tokens.numel() * ranks.size, t.plan.steps, flops, row["loss"])
        t.watch.step()
        if look_around(t, row):
            break
        heed(t)


def look_around(t: Training, row: dict) -> bool:
    """After a step: judge, log, sample and save where it is time; whether to stop early."""
    config, progress, last = t.config, t.progress, t.progress.step >= t.plan.steps
    improved = False
    if due(config.eval_every, progress.step) and not last:
        with t.aside():
            row |= judge(t, config.eval_batches)
        improved = note_best(progress, row)
    if due(config.log_every, progress.step) or last or "val_loss" in row:
        t.meter.log(row)
        for line in findings(t, row):
            t.meter.say(line)
    with t.aside():
        if due(config.sample_every, progress.step) and not last:
            show_sample(t, take_sample(t), sys.stderr)
        if due(config.save_every, progress.step) and not last or improved and config.keep_best:
            keep(t)
    if "val_loss" in row and 0 < config.early_stop <= progress.evaluations_without_gain:
        t.meter.say(f"stopping early: {progress.evaluations_without_gain} evaluations without gain")
        return True
    return False


def finish(t: Training) -> None:
    """The end. Which checkpoint is best is judged on the same part of the split all along."""
    config, progress = t.config, t.progress
    row = {"step": progress.step, "tokens": progress.tokens}
    t.meter.ending()
    with t.aside():
        row |= judge(t, config.final_eval_batches, to_the_end=False)
        same = not config.eval_every or config.eval_batches == config.final_eval_batches
        again = progress.step < t.plan.steps  # stopped early, by an evaluation of this very step
        found = row if same else judge(t, config.eval_batches, to_the_end=False)
        note_best(progress, found, counts=not again)
        t.meter.outlook.final_batches = 0
        t.meter.log(row)
        for line in findings(t, row):
            t.meter.say(line)
        progress.ended = True
        keep(t, final=True)
        text = take_sample(t)
    t.meter.close()
    show_sample(t, text, sys.stdout)
    t.ranks.say(farewell(t, row))


def begin_run(held: ExitStack, t: Training, settings: Settings) -> None:
    """Make the run's folder, nobody else's as long as `held`, and write what it is."""
    c, launch = t.config, t.ranks.world.launch
    t.run, lock = placing.make_run(c.out, c.preset, c.overwrite, launch, placing.sources(settings))
    held.enter_context(lock or nullcontext())
    t.corpus.tokenizer().save(t.run)
    facts = startup.facts_of(settings, t.corpus, launch) | t.fixed
    RunFolder(t.run).write_config(t.model.config, asdict(c), facts)  # with it, it is a run


if __name__ == "__main__":
    sys.exit(leave(program.run("train.py", main, sys.argv[1:], first_to_say)))
