"""What the loop of train.py works with, and what it does now and then: judge, sample, save."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from minillm import checkpoint, ladder
from minillm.agreement import agree
from minillm.checkpoint import Checkpoint
from minillm.config import ModelConfig, TrainConfig
from minillm.configure import RESUMABLE
from minillm.data import Batches, evaluation_windows, warnings_for
from minillm.evaluate import evaluate
from minillm.generate import generate
from minillm.meter import append
from minillm.model import GPT
from minillm.optim import Average
from minillm.pace import Pacer
from minillm.plan import Job, memory
from minillm.precision import LossScale
from minillm.ranks import Ranks
from minillm.recurrence import draw
from minillm.schedule import Schedule
from minillm.sharding import Sharding
from minillm.shards import Corpus
from minillm.statetensors import load_into, sharded_tensors

SAMPLE_TOKENS = 200
LADDER_WINDOWS = 64  # that recurrence is judged on, at every evaluation


@dataclass
class Progress:
    """What a run has come to; saved with each checkpoint. Losses in nats a token, times in s."""

    step: int = 0
    tokens: int = 0
    trained_s: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0


@dataclass
class Training:
    """A run in memory.

    fixed: what was decided once, at its start: threads, dtype, micro-batch.    micro: sequences of
    a micro-batch, as this number of ranks divides them.
    """

    run: Path
    config: TrainConfig
    corpus: Corpus
    sharding: Sharding
    average: Average | None
    progress: Progress
    plan: Schedule
    fixed: dict[str, int | str]
    micro: int
    scale: LossScale | None = None

    @property
    def model(self) -> GPT:
        """The decoder, on this rank."""
        return self.sharding.model

    @property
    def ranks(self) -> Ranks:
        """Who trains it."""
        return self.sharding.ranks


def save(t: Training) -> None:
    """Write a checkpoint, and drop those that are no longer to be kept. Every rank calls it."""
    shapes = {name: tuple(p.shape) for name, p in t.model.named_parameters()}
    tensors = sharded_tensors(t.sharding.pieces(), shapes)
    if t.average:
        tensors["ema"] = {name: t.average.weights[name] for name in t.ranks.share_of(shapes)}
    state = {
        "progress": asdict(t.progress),
        "settings": {name: getattr(t.config, name) for name in sorted(RESUMABLE)},
        "pace": t.plan.pace,
        "fixed": t.fixed,
        "scale": asdict(t.scale) if t.scale else None,
    }
    if t.ranks.size > 1:
        state["shapes"] = {name: list(shape) for name, shape in shapes.items()}
    checkpoint.save(t.run, t.progress.step, tensors, state, t.ranks)
    best = t.progress.best_step if t.config.keep_best else None
    first, keep = t.ranks.rank == 0, t.config.keep_last
    agree(t.ranks, lambda: checkpoint.prune(t.run, keep, best) if first else None)


def restore(t: Training, past: Checkpoint, pacer: Pacer, given: frozenset[str]) -> None:
    """Put the weights, the optimisers and the schedule back to where `past` left them.

    given: settings that the user changed. With a new length the schedule is that of a run which
    was meant to be so long from the start: the rate may go up again.
    """
    t.sharding.load(past)
    if t.scale and past.state.get("scale"):
        t.scale = LossScale(**past.state["scale"])
    if t.config.ema:
        t.average = Average(dict(t.model.named_parameters()), t.config.ema)
        load_into(t.average.weights, past.tensors("ema"), past.folder)
    if given & {"steps", "epochs", "time_limit"}:
        t.plan = pacer.schedule(past.step)
    else:
        t.plan = replace(t.plan, pace=tuple(map(tuple, past.state["pace"])))


def share_plan(t: Training) -> None:
    """The schedule of rank 0's clock for all ranks."""
    if t.ranks.size > 1:
        t.plan = replace(t.plan, pace=tuple(map(tuple, t.ranks.share(t.plan.pace))))


def _averaged(t: Training) -> AbstractContextManager[None]:
    """The model holds what will be sampled from: the averaged weights, if there are any."""
    return t.average.swapped_in() if t.average else nullcontext()


@torch.no_grad()
def judge(t: Training, batches: int) -> dict[str, float]:
    """Loss on `batches` batches of the validation split, spread evenly; 0: on the whole of it.

    Returns val_loss (nats a token), val_bpb (bits a byte of raw text) and val_tokens (how many were
    predicted); nothing without a split.
    """
    if t.corpus.tokens["val"] < 2:
        return {}
    limit = batches * t.config.batch_size or None
    windows = evaluation_windows(t.corpus, "val", t.model.config.seq_len, limit)
    with _averaged(t):
        result = evaluate(t.model, windows, t.micro, t.ranks)
        found = _judge_recurrence(t) if t.model.config.recurrent else {}
    bpb = result.bits_per_byte(t.corpus.tokens["val"], t.corpus.bytes["val"])
    return {"val_loss": result.loss, "val_bpb": bpb, "val_tokens": result.tokens, **found}


def _judge_recurrence(t: Training) -> dict:
    """Loss by recurrence and the signs of its failing, on a small part of the split."""
    few = evaluation_windows(t.corpus, "val", t.model.config.seq_len, LADDER_WINDOWS)
    with t.sharding.gathered():
        return ladder.measure(t.model, few, t.micro, t.ranks)


def worries(t: Training, row: dict) -> list[str]:
    """Warnings about what an evaluation found of the recurrence; none in the first tenth."""
    early = t.progress.step < t.plan.steps / 10
    if early or "val_loss_at_r" not in row:
        return []
    return [f"warning   {line}" for line in ladder.alarms(row, t.model.config.mean_recurrence)]


def recurrences(t: Training) -> list[int | None]:
    """How often the core runs for each group of sequences of the coming step; [None] without."""
    c, model = t.config, t.model.config
    if model.recurrent is None:
        return [None]
    mean = float(model.mean_recurrence)
    if c.recurrence_curriculum:
        mean = 1 + (mean - 1) * min(1.0, 4 * t.plan.progress(t.progress.step))
    return draw(c.seed, t.progress.step, c.recurrence_groups, mean, model.max_recurrence)


def note_best(progress: Progress, row: dict[str, float]) -> bool:
    """Note the validation loss in `row`, if any; returns whether it is the best of the run."""
    loss = row.get("val_loss")
    if loss is None:
        return False
    if progress.best_loss is not None and loss >= progress.best_loss:
        progress.evaluations_without_gain += 1
        return False
    progress.best_loss, progress.best_step = loss, progress.step
    progress.evaluations_without_gain = 0
    return True


def take_sample(t: Training) -> str:
    """What the model writes of itself; kept in samples.txt under the step.

    Nothing where the answers are not the next tokens, and of ranks but the first.
    """
    if t.corpus.sequence:
        return ""
    tokenizer = t.corpus.tokenizer()
    t.model.eval()
    with _averaged(t), t.sharding.gathered():
        made = generate(
            t.model, [tokenizer.prompt_ids("")], max_tokens=SAMPLE_TOKENS, temperature=0.8,
            top_p=0.95, seed=t.config.seed, stop=lambda row, ids: ids[-1] == tokenizer.bos_id,
        )  # fmt: skip
        text = tokenizer.decode([token.id for token in made if token.id != tokenizer.bos_id])
    t.model.train()
    if t.ranks.rank:
        return ""
    try:
        append(t.run / "samples.txt", f"=== step {t.progress.step}\n{text}\n")
    except OSError as error:
        t.ranks.say(f"warning   {t.run}/samples.txt: {error.strerror}; this sample is left out")
    return text


def announce(
    t: Training, batches: Batches, step_s: float, why_threads: str, device: torch.device
) -> list[str]:
    """Lines to print before the first step: what is trained, on what, and how long it takes."""
    c, model, plan = t.config, t.model.config, t.plan
    left = plan.steps - t.progress.step
    seconds = left * step_s
    if c.time_limit is not None:
        seconds = min(seconds, c.time_limit - t.progress.trained_s)
    step_tokens = c.batch_size * model.seq_len
    judged = c.final_eval_batches * step_tokens or t.corpus.tokens["val"]
    judge_s = min(judged, t.corpus.tokens["val"]) / step_tokens * step_s / 3  # forward only
    warnings = warnings_for(t.corpus.tokens["train"], plan.steps * step_tokens, model.n_parameters)
    if plan.warmup > plan.steps / 2:
        warnings.append(f"--warmup {plan.warmup} is most of the {plan.steps} steps")
    return [
        f"run       {t.run}" + (f" from step {t.progress.step}" if t.progress.step else ""),
        f"text      {t.corpus.bytes['train']:,} + {t.corpus.bytes['val']:,} bytes, "
        f"{t.corpus.tokens['train']:,} + {t.corpus.tokens['val']:,} tokens (train + validation)",
        f"model     {model.n_parameters:,} parameters, {_layers(model)} layers of {model.d_model}, "
        f"context {model.seq_len}, vocabulary {model.vocab_size}",
        f"machine   {device}, {t.fixed['dtype']}{_tf32(device)}, {t.model.ops.name} kernels "
        f"({t.model.ops.why}), {t.fixed['threads']} threads ({why_threads})",
        *_ranks(t),
        f"training  {left:,} steps of {c.batch_size} x {model.seq_len} tokens, "
        f"{t.micro} sequences at a time, {batches.epochs(plan.steps):.2f} "
        f"epochs; about {duration(seconds)}, then {duration(judge_s)} to evaluate",
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
