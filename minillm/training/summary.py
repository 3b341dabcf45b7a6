"""What a run says before its first step and after its last."""

from math import ceil

import torch

from minillm.config.train import ModelConfig
from minillm.data.batches import warnings_for
from minillm.model.size import flops_per_token, n_parameters
from minillm.planning.estimate import Job, memory
from minillm.runtime import device as world
from minillm.runtime.launch import shell_command
from minillm.runtime.units import things
from minillm.training.metrics import Meter
from minillm.training.outlook import Outlook
from minillm.training.state import Training


def announce(t: Training) -> list[str]:
    """Lines to print before the first step: what is trained, on what, and how long it takes."""
    step_s, device = t.pacer.guess_s, t.ranks.device
    c, model, plan = t.config, t.model.config, t.plan
    left = max(0, plan.steps - t.progress.step)
    seconds = left * step_s
    if c.time_limit is not None:
        seconds = min(seconds, t.pacer.limit - t.progress.trained_s)
    step_tokens = c.batch_size * model.seq_len
    judged = c.final_eval_batches * step_tokens or t.corpus.tokens["val"]
    judge_s = min(judged, t.corpus.tokens["val"]) / step_tokens * step_s / 3  # forward only
    warnings = warnings_for(t.corpus.tokens["train"], plan.steps * step_tokens, n_parameters(model))
    if plan.warmup > plan.steps / 2:
        warnings.append(f"--warmup {plan.warmup} is most of the {plan.steps} steps")
    return [
        f"run       {t.run}" + (f" from step {t.progress.step}" if t.progress.step else ""),
        f"text      {t.corpus.bytes['train']:,} + {t.corpus.bytes['val']:,} bytes, "
        f"{t.corpus.tokens['train']:,} + {t.corpus.tokens['val']:,} tokens (train + validation)",
        f"model     {n_parameters(model):,} parameters, {_layers(model)} layers of "
        f"{model.d_model}, context {model.seq_len}, vocabulary {model.vocab_size:,}",
        f"machine   {device}, {t.fixed['dtype']}{_tf32(device)}, {t.model.ops.name} kernels "
        f"({t.model.ops.why}), {things(t.fixed['threads'], 'thread')} ({t.why_threads})",
        *_ranks(t),
        f"training  {left:,} steps of {c.batch_size} x {model.seq_len} tokens, "
        f"{t.micro} sequences at a time, {t.batches.epochs(plan.steps):.2f} "
        f"epochs; about {duration(seconds)}, then {duration(judge_s)} to evaluate",
        *lengthened(t),
        *(f"warning   {warning}" for warning in warnings),
    ]


def _tf32(device: torch.device) -> str:
    """What products of fp32 matrices are computed in on a GPU."""
    if device.type != "cuda":
        return ""
    return " (TF32 on)" if torch.backends.cuda.matmul.allow_tf32 else " (TF32 off)"


def _ranks(t: Training) -> list[str]:
    c = t.config
    if t.ranks.size == 1 and not c.zero:
        return []
    width = {"fp32": 4}.get(t.fixed["dtype"], 2)
    job = Job(t.model.config, t.ranks.size, c.batch_size, None, width, c.optimizer,
                   bool(c.ema), c.offload)  # fmt: skip
    kinds = {kind: n for kind, n in memory(job, c.zero).items() if n}
    told = ", ".join(f"{kind} {n / 2**20:,.1f}" for kind, n in kinds.items())
    return [f"ranks     {t.ranks.size}, --zero {c.zero}; MiB of each: {told}, and activations"]


def _layers(model: ModelConfig) -> str:
    if model.recurrent is None:
        return str(model.n_layer)
    prelude, core, coda = model.depths
    return f"{prelude} + {core} x {model.mean_recurrence} (up to {model.max_recurrence}) + {coda}"


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{max(0, seconds):.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def nothing_left(t: Training) -> str:
    """Return one line for a run that is resumed, and has already done all that it was asked for."""
    step, c = t.progress.step, t.config
    resume = shell_command("train", "--resume", t.run)
    if step < t.plan.steps:
        return (
            f"{t.run} stopped early at step {step}, after {t.progress.evaluations_without_gain} "
            f"evaluations without gain; train on: {resume} --steps N"
        )
    if not t.asked:
        return f"{t.run} is finished at step {step}; train on: {resume} --steps N"
    total = f"--steps {c.steps}" if c.steps is not None else f"--epochs {c.epochs:g}"
    return (
        f"{t.run} is finished at step {step}, and {total} counts from its start; train on: "
        f"{resume} --steps N, N above {step}, or --time-limit 10m for ten more minutes"
    )


def lengthened(t: Training) -> list[str]:
    """Return a line about the length that a resumed run was asked for, if it was."""
    c, p = t.config, t.progress
    if "time_limit" in t.asked:
        return [f"time      {duration(c.time_limit)} more, {duration(p.trained_s)} so far"]
    if t.asked and p.step >= t.plan.steps:
        return [f"length    {t.plan.steps} steps in all, which are done: evaluating and saving"]
    return []


def farewell(t: Training, row: dict) -> str:
    """What came out, and what to type next."""
    p = t.progress
    lines = [f"{t.run}: step {p.step:,}, {p.tokens:,} tokens, {p.trained_s:.0f} s of training"]
    if "val_loss" in row:
        loss, bpb = row["val_loss"], row["val_bpb"]
        lines.append(f"validation: {loss:.4f} nats a token, {bpb:.4f} bits a byte")
    lines.append(f"sample it:  {shell_command('sample', t.run)}")
    return "\n".join(lines)


def meter_of(t: Training) -> Meter:
    """Return what reports the run from here on; on ranks other than the first it prints nothing."""
    peak = world.measured_peak_flops(t.ranks.device, t.model.dtype)
    path = t.run / "metrics.jsonl" if t.ranks.rank == 0 else None
    flops = flops_per_token(t.model.config)
    return Meter(path, t.progress.step, t.plan.steps, flops, t.ranks.size * peak, outlook_of(t))


def outlook_of(t: Training) -> Outlook:
    """Return the estimate of the run's remaining time, as it is before its first step."""
    c, rows = t.config, t.micro * t.ranks.size
    tokens, seq_len = t.corpus.tokens["val"], t.model.config.seq_len
    windows = ceil((tokens - 1) / seq_len) if tokens > 1 else 0

    def parts(batches: int) -> int:
        return ceil(min(windows, batches * c.batch_size or windows) / rows)

    # The best checkpoint is judged on eval_batches, the last one on final_eval_batches.
    both = bool(c.eval_every) and c.eval_batches != c.final_eval_batches
    return Outlook(
        elapsed=lambda: t.pacer.trained_s,
        limit=t.pacer.limit,
        every={"evaluating": c.eval_every, "saving": c.save_every, "sampling": c.sample_every},
        batches=parts(c.eval_batches),
        final_batches=parts(c.final_eval_batches) + both * parts(c.eval_batches),
        parts=c.batch_size // rows,
    )
