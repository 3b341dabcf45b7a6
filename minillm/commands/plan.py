"""`python -m minillm plan`: estimate memory and time of a training before it runs."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace

from minillm.checkpoint.run_folder import RunFolder
from minillm.config.fields import as_tuple
from minillm.config.flags import Settings
from minillm.config.train import ModelConfig, TrainConfig
from minillm.data import documents
from minillm.data.batches import Batches
from minillm.data.bpe import choose_vocab_size
from minillm.data.shards import Corpus, is_prepared
from minillm.data.tokenizer import load_tokenizer
from minillm.errors import UsageError
from minillm.flags import plan as flags
from minillm.model.size import flops_per_token, n_parameters
from minillm.planning import estimate as plan, fit as plan_fit, hardware
from minillm.planning.fit import Budget, Verdict
from minillm.planning.hardware import Hardware, Speeds
from minillm.planning.network import Network
from minillm.planning.tables import shown
from minillm.runtime import terminal
from minillm.runtime.json_text import json_text
from minillm.runtime.launch import World
from minillm.runtime.units import span
from minillm.training.begin import begin
from minillm.training.budget import requested_steps
from minillm.training.corpus import find_corpus, fit_to_corpus

DEFAULT_TEXT = 11_000_000  # approximate bytes of the default corpus
CHARACTERS = 65  # different characters of tiny shakespeare
# A micro-batch that is shorter than this on a GPU takes about as long as launching its kernels.
LAUNCH_S = 0.01
GPU_PRESET = "tiny"  # preset of train.py on a GPU if no preset is named


def main(argv: Sequence[str]) -> None:
    """Print the plan of the training that the command line describes to standard output."""
    args = flags.parse(argv)
    card = hardware.check(args)
    settings, run = begin(args, World(), GPU_PRESET if hardware.is_described(args) else None)
    model, corpus, vocabulary = _vocabulary(settings, run)
    train = settings.train
    asked = _job(args, train, model)  # raises errors before anything is measured
    on = hardware.describe(args, train, card, model.d_model)
    job = replace(asked, width=on.dtype.itemsize)
    budget = Budget(on.dtype, on.kind == "GPU", on.capacity)
    if train.micro_batch_size == "auto":  # training also takes the largest that fits
        rows = budget.largest(job, train.zero)
        job = replace(job, micro_batch=job.share if rows is None else max(rows, 1))
    verdict = plan_fit.judge(budget, job, train.zero, card.name if card else None)
    found = {
        "ranks": job.ranks,
        "zero": train.zero,
        "micro_batches": job.micro_batches,
        "extrapolation": not (on.measured and on.network.measured),
        "model": _model(model, train),
        "gpu": hardware.raw(on),
        "verdict": verdict.raw,
        "parameters": _parameters(model, vocabulary),
        "flops": _flops(job, _steps(settings, model, corpus), train.time_limit),
        "memory": _memory(job, budget),
    }
    found["time"] = _times(job, on.network, on.speeds, found["flops"]["steps"])
    compute_s = found["time"][str(train.zero)]["compute_s"] / job.micro_batches
    found["launches_count"] = on.kind == "GPU" and compute_s < LAUNCH_S
    found["figures"] = _figures(job, on, verdict, train)
    if found["launches_count"]:
        found["figures"].append(
            f"a micro-batch computes for less than {span(LAUNCH_S)}: launching its kernels, which "
            "is left out, may take longer than that"
        )
    if args.json:
        terminal.say(json_text(found), sys.stdout)
    else:
        text = shown(found, hardware.in_words(on, job.ranks, args.node_gpus))
        terminal.say(text, sys.stdout)


def _job(args: Namespace, train: TrainConfig, model: ModelConfig) -> plan.Job:
    """Return the job to plan, with the dtype still open; raise UsageError if it cannot run."""
    job = plan.Job(
        model,
        args.gpus,
        train.batch_size,
        None if train.micro_batch_size == "auto" else int(train.micro_batch_size),
        optimizer=train.optimizer,
        average=bool(train.ema),
        offload=train.offload,
        again=train.activation_checkpointing,
    )
    if reason := plan.refusal(job, train.zero):
        raise UsageError(reason)
    return job


def _figures(job: plan.Job, on: Hardware, verdict: Verdict, train: TrainConfig) -> list[str]:
    """Return sentences about the sources of the figures and the assumptions."""
    word = str(on.dtype).removeprefix("torch.")
    times, rows = job.micro_batches, verdict.micro
    micro = (
        f"{word}; {times} micro-batch{'es' * (times > 1)} of {rows} sequence{'s' * (rows > 1)} "
        "per rank in a step"
    )
    if train.micro_batch_size == "auto":
        micro += ": the largest that fits" if verdict.largest else ": assumed"
    deep = ", at the deepest recurrence that has gradients" if job.model.recurrent else ""
    kept = f"activations: counted from the shapes that eager operations keep on a {on.kind}{deep}"
    usable = f"memory of a rank: {hardware.memory_in_words(on.capacity)}; {on.capacity.reason}"
    return [micro, *([usable] if on.capacity.total else []), kept, *on.notes]


def _vocabulary(
    settings: Settings, run: RunFolder | None
) -> tuple[ModelConfig, Corpus | None, str]:
    """Return the model with a vocabulary, the corpus if prepared, and the vocabulary's source."""
    model, train = settings.model, settings.train
    paths = as_tuple(train.data)
    if len(paths) == 1 and is_prepared(paths[0]):
        corpus = find_corpus(settings, run, lambda line: None)
        model = fit_to_corpus(settings, corpus)
        return model, corpus, f"{model.vocab_size:,}, of {paths[0]}"
    for part in (paths, as_tuple(train.val)):
        if part:
            documents.find(part, train.encoding, train.text_column)  # raises if it does not exist
    if model.vocab_size is not None:
        who = "given" if "vocab_size" in settings.given else "the preset's or the run's"
        return model, None, f"{model.vocab_size:,}, {who}"
    kind = train.tokenizer
    size, why = {
        "byte": (257, "bytes and the mark of a document"),
        "char": (CHARACTERS, "assumed: the characters of tiny shakespeare"),
        "bpe": (choose_vocab_size(DEFAULT_TEXT), "assumed: what bpe takes for the default corpus"),
    }.get(kind, (None, f"of {kind}"))
    if size is None:
        size = load_tokenizer(kind).vocab_size
    return replace(model, vocab_size=size), None, f"{size:,}, {why}"


def _steps(settings: Settings, model: ModelConfig, corpus: Corpus | None) -> int | None:
    train = settings.train
    if train.steps is not None or corpus is None:
        return train.steps
    batches = Batches(corpus, model.seq_len, train.batch_size, train.seed)
    return requested_steps(train, batches)


def _model(model: ModelConfig, train: TrainConfig) -> dict:
    """Return the shape of the model, and the preset."""
    return {
        "preset": train.preset,
        "depths": list(model.depths) if model.recurrent else [model.n_layer],
        "mean_recurrence": model.mean_recurrence if model.recurrent else None,
        "d_model": model.d_model,
        "seq_len": model.seq_len,
        "batch_size": train.batch_size,
    }


def _parameters(model: ModelConfig, vocabulary: str) -> dict:
    parts = {n: {"stored": s, "used": u} for n, (s, u) in plan.parts(model).items()}
    return {"parts": parts, "total": n_parameters(model), "vocabulary": vocabulary}


def _flops(job: plan.Job, steps: int | None, time_limit_s: float | None) -> dict:
    step = plan.step_flops(job)
    return {
        "token": flops_per_token(job.model),
        "step": step,
        "step_tokens": job.tokens,
        "steps": steps,
        "run": None if steps is None else steps * step,
        "time_limit_s": time_limit_s,
    }


def _memory(job: plan.Job, budget: Budget) -> dict[str, dict | None]:
    """Return {stage: bytes of a rank by kind}, with None for a stage that the job cannot have."""
    return {
        str(stage): budget.parts(job, stage) if _possible(job, stage) else None
        for stage in plan.STAGES
    }


def _possible(job: plan.Job, stage: int) -> bool:
    """Return whether a stage has a column; stage 0 is shown without offload."""
    return plan.refusal(replace(job, offload=False), stage) is None


def _times(job: plan.Job, network: Network, speeds: Speeds, steps: int | None) -> dict:
    found: dict[str, dict | None] = {}
    for stage in plan.STAGES:
        if not _possible(job, stage):
            found[str(stage)] = None
            continue
        compute_s = plan.compute_seconds(job, speeds.flops)
        optimizer_s = plan.optimizer_seconds(job, stage, speeds.flops, speeds.memory, speeds.host)
        time = plan.step_time(job, stage, network, compute_s, optimizer_s, speeds.overlap)
        found[str(stage)] = {
            **asdict(time),
            "total_s": time.total_s,
            "tokens_per_s": job.tokens / time.total_s,
            "run_s": None if steps is None else steps * time.total_s,
        }
    return found
