"""Train a decoder on text: from raw files to a run folder you can sample from.

    python train.py                                  this Python's own source files, two minutes
    python train.py --data my.txt --time-limit 10m   your text, your time
    python train.py --resume                         go on with the newest run

It reads from top to bottom: what to do, on which data, with which model; the loop; the end.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from minillm import checkpoint, errors, runs, startup, world
from minillm.config import ModelConfig
from minillm.data import Batches
from minillm.meter import Meter
from minillm.microbatch import largest_that_fits, seconds_per_step
from minillm.model import GPT
from minillm.ops import select
from minillm.optim import Average, make_optimizers, set_learning_rate
from minillm.pace import Pacer, wished_steps
from minillm.recurrence import state_keys
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
    """Train as the command line says."""
    # What to do.
    args = startup.command_line(__doc__.split("\n")[0]).parse(argv)
    settings, run, past = startup.begin(args)
    if args.print_config:
        print(startup.config_text(settings))
        return
    if world.launched().size > 1:
        raise errors.UsageError("this version trains in one process")
    config = settings.train
    device = world.pick_device(config.device)

    # On which data.
    corpus = startup.find_corpus(settings, run if past else None, say)
    shape = startup.fit_to_corpus(settings, corpus)
    startup.require_memory(shape, device)
    batches = Batches(corpus, shape.seq_len, config.batch_size, config.seed)

    # With which model.
    fixed = dict(past.state["fixed"]) if past else {}
    fixed["threads"], why = world.set_threads(
        fixed["threads"] if past and "threads" not in settings.given else config.threads
    )
    dtype = world.pick_dtype(fixed.get("dtype", config.dtype), device, shape.d_model)
    fixed["dtype"] = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
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
            largest_that_fits(model, config.batch_size, device, copies)
            if config.micro_batch_size == "auto"
            else int(config.micro_batch_size)
        )
    parameters = dict(model.named_parameters())
    betas = (config.beta1, config.beta2)
    optimizers = make_optimizers(
        config.optimizer, parameters, model.matrices(), ops, betas, config.weight_decay, dtype,
        model.undecayed(),
    )  # fmt: skip

    # From where, and for how long.
    step_s = seconds_per_step(model, config.batch_size, fixed["micro_batch_size"], device)
    progress = Progress(**past.state["progress"]) if past else Progress()
    pacer = Pacer(config, wished_steps(config, batches), progress.trained_s, step_s)
    t = Training(run, config, corpus, model, optimizers, None, progress, pacer.schedule(), fixed)
    if past:
        restore(t, past, pacer, settings.given)
        if progress.step >= t.plan.steps:
            say(f"{run} is finished at step {progress.step}; go on with --resume {run} --steps N")
            return
    else:
        if config.init_from:
            checkpoint.open_checkpoint(Path(config.init_from)).load_into(model)
        t.average = Average(parameters, config.ema) if config.ema else None
        t.run = runs.make_run(config.out, config.preset, config.overwrite)
        facts = startup.facts_of(settings, corpus) | fixed
        runs.write_config(t.run, shape, asdict(config), facts)
        corpus.tokenizer().save(t.run)
    for line in announce(t, batches, step_s, why, device):
        say(line)

    # The loop.
    meter = Meter(
        t.run / "metrics.jsonl", progress.step, t.plan.steps, shape.flops_per_token(),
        world.measured_peak_flops(device, dtype),
    )  # fmt: skip
    forward = compiled(model) if config.compile else model
    while progress.step < t.plan.steps:
        rate = t.plan.learning_rate(progress.step)
        set_learning_rate(optimizers, rate)
        if shape.dropout:  # a function of the step, so that a resumed run drops the same
            torch.manual_seed((config.seed * 1_000_003 + progress.step) % 2**63)
        tokens, targets = batches.batch(progress.step)
        rounds = recurrences(t)
        first = progress.step * config.batch_size
        keys = state_keys(config.seed, torch.arange(first, first + len(tokens)))
        batch = (x.to(device) for x in (tokens, targets, keys))
        loss = accumulate(forward, *batch, fixed["micro_batch_size"], rounds)
        norm = nn.utils.get_total_norm([p.grad for p in parameters.values()])
        refuse_non_finite(progress.step, loss, norm)
        for optimizer in optimizers:
            optimizer.step(grad_scale=clip_factor(norm, config.grad_clip))
            optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += tokens.numel()
        if t.average:
            t.average.update(progress.step)
        progress.trained_s = pacer.trained_s
        t.plan = pacer.keep_to_time(t.plan, progress.step)

        last = progress.step >= t.plan.steps
        meter.step(tokens.numel(), t.plan.steps, mean_flops(shape, rounds))
        row = {
            "step": progress.step, "tokens": progress.tokens, "loss": float(loss), "lr": rate,
            "grad_norm": float(norm), "peak_memory_mib": peak_mib(device),
        }  # fmt: skip
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
    say(farewell(t, row))


def say(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


def due(every: int, step: int) -> bool:
    """Whether something that happens `every` so many steps (0: never) happens after `step`."""
    return every > 0 and step % every == 0


def peak_mib(device: torch.device) -> float | None:
    """Peak memory of this process in MiB, where the system says."""
    peak = world.peak_memory(device)
    return None if peak is None else peak / 2**20


def accumulate(
    forward: Callable, tokens: Tensor, targets: Tensor, keys: Tensor, micro: int,
    rounds: Sequence[int | None],
) -> Tensor:  # fmt: skip
    """Gradients of the batch's mean loss, `micro` sequences at a time; returns that loss, ().

    tokens, targets: (B, T).    keys: (B,) of start states.    A micro-batch weighs as many targets
    as it has. rounds: the recurrence of each group of sequences; sequence i is of group i modulo
    their number.
    """
    count = (targets != -100).sum()
    some = (targets != -100).any(1).cpu()  # the mean over no target would be nan
    if not some.any():
        raise errors.UsageError("no target of this batch counts; take a larger --batch-size")
    total = torch.zeros((), device=tokens.device)
    for group, r in enumerate(rounds):
        rows = (x[group :: len(rounds)].split(micro) for x in (tokens, targets, keys, some))
        for x, y, k, counts in zip(*rows, strict=True):
            if not counts.any():
                continue
            loss = forward(x, y, r, k) * ((y != -100).sum() / count)
            loss.backward()
            total += loss.detach()
    return total


def mean_flops(shape: ModelConfig, rounds: Sequence[int | None]) -> float:
    """FLOPs a token of a step, over its groups."""
    return sum(shape.flops_per_token(r) for r in rounds) / len(rounds)


def compiled(model: GPT) -> Callable:
    """The model compiled: as one, or where its core runs again and again, block by block."""
    if model.config.recurrent is None:
        return torch.compile(model)
    model.compiled = [torch.compile(block) for block in model.blocks]
    return model


def clip_factor(norm: Tensor, limit: float) -> Tensor | None:
    """What gradients of total norm `norm` are multiplied by to have at most `limit`; 0: no limit.

    norm: ().    Returns () on its device, so that nothing waits for it.
    """
    return (limit / (norm + 1e-6)).clamp(max=1.0) if limit else None


def refuse_non_finite(step: int, loss: Tensor, norm: Tensor) -> None:
    """Raise DivergedError before the optimiser moves on a loss or gradient that is not finite."""
    if not torch.isfinite(loss + norm):
        raise errors.DivergedError(
            f"step {step}: loss {float(loss):g}, gradient norm {float(norm):g}; the weights of the "
            "last checkpoint are good; start again with a smaller --learning-rate"
        )


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
    sys.exit(errors.run("train.py", main, sys.argv[1:]))
