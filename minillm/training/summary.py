"""Describe a run before its first step, and its result after the last one."""

from math import ceil
from pathlib import Path

import torch

from minillm.config.train import ModelConfig
from minillm.data.batches import warnings_for
from minillm.model.size import flops_per_token, n_parameters
from minillm.planning.estimate import Job, memory
from minillm.runtime import device
from minillm.runtime.launch import shell_command
from minillm.runtime.units import things
from minillm.training.budget import StepBudget
from minillm.training.outlook import Outlook
from minillm.training.reporter import Reporter
from minillm.training.setup import Setup
from minillm.training.state import TrainState
from minillm.training.watchdog import Watchdog


def announce(setup: Setup, state: TrainState, budget: StepBudget, run: Path) -> list[str]:
    """Return the lines to print before the first step: text, model, machine, length of the run.

    setup: everything that is decided before the first step
    state: state of the run
    budget: number of steps of the run, and its clock
    run: folder of the run
    """
    config, corpus, shape = setup.config, setup.corpus, setup.model.config
    step, steps = state.progress.step, state.schedule.steps
    from_step = f" from step {step}" if step else ""
    return [
        f"run       {run}{from_step}",
        f"text      {corpus.bytes['train']:,} + {corpus.bytes['val']:,} bytes, "
        f"{corpus.tokens['train']:,} + {corpus.tokens['val']:,} tokens (train + validation)",
        f"model     {n_parameters(shape):,} parameters, {_layers(shape)} layers of "
        f"{shape.d_model}, context {shape.seq_len}, vocabulary {shape.vocab_size:,}",
        _machine(setup),
        *_ranks(setup),
        f"training  {max(0, steps - step):,} steps of {config.batch_size} x {shape.seq_len} "
        f"tokens, {setup.micro_batch} sequences at a time, {setup.batches.epochs(steps):.2f} "
        f"epochs; {_duration_of_run(setup, state, budget)}",
        *_lengthened(setup, state),
        *(f"warning   {warning}" for warning in _warnings(setup, state)),
    ]


def _duration_of_run(setup: Setup, state: TrainState, budget: StepBudget) -> str:
    """Return how long training and the last evaluation will take, in words."""
    config, val_tokens = setup.config, setup.corpus.tokens["val"]
    step_s = budget.guess_s
    seconds = max(0, state.schedule.steps - state.progress.step) * step_s
    if config.time_limit is not None:
        seconds = min(seconds, budget.limit - state.progress.trained_s)
    step_tokens = config.batch_size * setup.model.config.seq_len
    tokens = min(config.final_eval_batches * step_tokens or val_tokens, val_tokens)
    evaluation_s = tokens / step_tokens * step_s / 3  # a forward pass is a third of a step
    return f"about {duration(seconds)}, then {duration(evaluation_s)} to evaluate"


def _warnings(setup: Setup, state: TrainState) -> list[str]:
    schedule, shape = state.schedule, setup.model.config
    tokens = schedule.steps * setup.config.batch_size * shape.seq_len
    found = warnings_for(setup.corpus.tokens["train"], tokens, n_parameters(shape))
    if schedule.warmup > schedule.steps / 2:
        found.append(f"--warmup {schedule.warmup} is most of the {schedule.steps} steps")
    return found


def _machine(setup: Setup) -> str:
    ops, where, threads = setup.model.ops, setup.ranks.device, setup.decided["threads"]
    return (
        f"machine   {where}, {setup.decided['dtype']}{_tf32(where)}, {ops.name} kernels "
        f"({ops.why}), {things(threads, 'thread')} ({setup.threads_reason})"
    )


def _tf32(where: torch.device) -> str:
    """Return whether a GPU computes products of fp32 matrices in TF32."""
    if where.type != "cuda":
        return ""
    return " (TF32 on)" if torch.backends.cuda.matmul.allow_tf32 else " (TF32 off)"


def _ranks(setup: Setup) -> list[str]:
    """Return a line about what each rank holds, unless there is only one, without --zero."""
    c, n = setup.config, setup.ranks.size
    if n == 1 and not c.zero:
        return []
    width = {"fp32": 4}.get(setup.decided["dtype"], 2)
    job = Job(setup.model.config, n, c.batch_size, None, width, c.optimizer, bool(c.ema), c.offload)
    kinds = {kind: size for kind, size in memory(job, c.zero).items() if size}
    parts = ", ".join(f"{kind} {size / 2**20:,.1f}" for kind, size in kinds.items())
    return [f"ranks     {n}, --zero {c.zero}; MiB of each: {parts}, and activations"]


def _layers(shape: ModelConfig) -> str:
    if shape.recurrent is None:
        return str(shape.n_layer)
    prelude, core, coda = shape.depths
    return f"{prelude} + {core} x {shape.mean_recurrence} (up to {shape.max_recurrence}) + {coda}"


def duration(seconds: float) -> str:
    """Return a length of time in words: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{max(0, seconds):.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def nothing_left(setup: Setup, state: TrainState, run: Path) -> str:
    """Return the line about a run that was resumed, but is finished already.

    setup: everything that is decided before the first step
    state: state of the run
    run: folder of the run
    """
    step, config = state.progress.step, setup.config
    resume = shell_command("train", "--resume", run)
    if not state.is_last:
        evaluations = state.progress.evaluations_without_gain
        return (
            f"{run} stopped early at step {step}, after {evaluations} evaluations without gain; "
            f"train on: {resume} --steps N"
        )
    if not setup.asked_lengths:
        return f"{run} is finished at step {step}; train on: {resume} --steps N"
    total = f"--steps {config.steps}" if config.steps is not None else f"--epochs {config.epochs:g}"
    return (
        f"{run} is finished at step {step}, and {total} counts from its start; train on: "
        f"{resume} --steps N, N above {step}, or --time-limit 10m for ten more minutes"
    )


def _lengthened(setup: Setup, state: TrainState) -> list[str]:
    """Return a line about the length that a run was resumed with, if there is something to say."""
    asked = setup.asked_lengths
    if "time_limit" in asked:
        limit, trained_s = setup.config.time_limit, state.progress.trained_s
        return [f"time      {duration(limit)} more, {duration(trained_s)} so far"]
    if asked and state.is_last:
        steps = state.schedule.steps
        return [f"length    {steps} steps in all, which are done: evaluating and saving"]
    return []


def farewell(state: TrainState, row: dict, run: Path) -> str:
    """Return the result of a run in words, and the command to type next.

    state: state of the run
    run: folder of the run
    row: row of metrics of the last evaluation
    """
    p = state.progress
    lines = [f"{run}: step {p.step:,}, {p.tokens:,} tokens, {p.trained_s:.0f} s of training"]
    if "val_loss" in row:
        loss, bpb = row["val_loss"], row["val_bpb"]
        lines.append(f"validation: {loss:.4f} nats a token, {bpb:.4f} bits a byte")
    lines.append(f"sample it:  {shell_command('sample', run)}")
    return "\n".join(lines)


def reporter_of(setup: Setup, state: TrainState, budget: StepBudget, run: Path) -> Reporter:
    """Return the reporter of a run. On ranks other than the first it prints nothing.

    setup: everything that is decided before the first step
    state: state of the run
    budget: number of steps of the run, and its clock
    run: folder of the run
    """
    ranks, model = setup.ranks, setup.model
    peak = ranks.size * device.measured_peak_flops(ranks.device, model.dtype)
    return Reporter(
        run / "metrics.jsonl" if ranks.rank == 0 else None,
        state.progress.step,
        state.schedule.steps,
        flops_per_token(model.config),
        peak,
        _outlook_of(setup, budget),
        Watchdog(setup.config.hang_timeout, budget.guess_s, ranks.say),
    )


def _outlook_of(setup: Setup, budget: StepBudget) -> Outlook:
    """Return the estimate of the run's remaining time before its first step."""
    config, rows = setup.config, setup.micro_batch * setup.ranks.size
    tokens, seq_len = setup.corpus.tokens["val"], setup.model.config.seq_len
    windows = ceil((tokens - 1) / seq_len) if tokens > 1 else 0

    def parts(batches: int) -> int:
        return ceil(min(windows, batches * config.batch_size or windows) / rows)

    # The best checkpoint is judged on eval_batches, the last one on final_eval_batches.
    both = bool(config.eval_every) and config.eval_batches != config.final_eval_batches
    return Outlook(
        elapsed=lambda: budget.trained_s,
        limit=budget.limit,
        every={
            "evaluating": config.eval_every,
            "saving": config.save_every,
            "sampling": config.sample_every,
        },
        batches=parts(config.eval_batches),
        final_batches=parts(config.final_eval_batches) + both * parts(config.eval_batches),
        parts=config.batch_size // rows,
    )
