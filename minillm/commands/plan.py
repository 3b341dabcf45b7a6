"""`python -m minillm plan`: what a training takes, before anything runs."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from minillm import activations, documents, links, plan, startup, terminal, world
from minillm.bpe import choose_vocab_size
from minillm.config import ModelConfig, TrainConfig
from minillm.data import Batches
from minillm.errors import UsageError
from minillm.flags import plan as flags
from minillm.flags.plan import (
    HOST_GBS,
    LATENCY_US,
    LINK_GBS,
    MFU,
    NODE_GPUS,
    NODE_LINK_GBS,
    OVERLAP,
)
from minillm.json_text import json_text
from minillm.launch import World
from minillm.links import Link, Network
from minillm.pace import wished_steps
from minillm.plan_text import shown
from minillm.profiling import machine
from minillm.settings import Settings
from minillm.shards import Corpus, is_prepared
from minillm.tokenizer import load_tokenizer

DEFAULT_TEXT = 11_000_000  # bytes of the default corpus, about
CHARACTERS = 65  # of tiny shakespeare


def main(argv: Sequence[str]) -> None:
    """Plan the training that train.py's flags describe; the tables go to standard output."""
    args = flags.parse(argv)
    settings, run = startup.begin(args, World())
    model, corpus, vocabulary = _vocabulary(settings, run)
    train = settings.train
    device = world.pick_device(train.device)
    dtype = world.pick_dtype(train.dtype, device, model.d_model)
    job = plan.Job(
        model,
        args.gpus,
        train.batch_size,
        None if train.micro_batch_size == "auto" else int(train.micro_batch_size),
        dtype.itemsize,
        train.optimizer,
        bool(train.ema),
        train.offload,
        train.activation_checkpointing,
    )
    if reason := plan.refusal(job, train.zero):
        raise UsageError(reason)
    network = _network(args)
    here = network.measured and args.flops is None
    fused = device.type != "cpu" or args.flops is not None
    found = {
        "ranks": job.ranks,
        "zero": train.zero,
        "micro_batches": job.micro_batches,
        "extrapolation": not here,
        "parameters": _parameters(model, vocabulary),
        "flops": _flops(job, _steps(settings, model, corpus), train.time_limit),
        "memory": _memory(job, dtype, fused),
    }
    speeds, said = _speeds(args, train, device, dtype, network)
    found["time"] = _times(job, network, speeds, found["flops"]["steps"])
    micro = f"micro-batches of a rank in a step: {job.micro_batches}"
    if train.micro_batch_size == "auto":
        micro += ", assumed: all its sequences at once; --micro-batch-size says otherwise"
    deep = ", at the deepest recurrence that has gradients" if model.recurrent else ""
    kept = f"activations: what eager operations keep on {'a GPU' if fused else 'a CPU'}{deep}"
    found["figures"] = [f"dtype {str(dtype).removeprefix('torch.')}", micro, kept, *said]
    terminal.say(json_text(found) if args.json else shown(found), sys.stdout)


def _vocabulary(settings: Settings, run: Path | None) -> tuple[ModelConfig, Corpus | None, str]:
    """The model with a vocabulary, the corpus where it is prepared, and whose vocabulary it is."""
    model, train = settings.model, settings.train
    if train.data and is_prepared(train.data):
        corpus = startup.find_corpus(settings, run, lambda line: None)
        model = startup.fit_to_corpus(settings, corpus)
        return model, corpus, f"{model.vocab_size:,}, of {train.data}"
    if train.data:
        documents.find([train.data])  # refuses what is not there
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
    return wished_steps(train, batches)


def _network(args: Namespace) -> Network:
    if args.gpus == 1:
        return links.alone()
    if args.links:
        return links.read(args.links, args.gpus)
    latency_s = (LATENCY_US if args.latency_us is None else args.latency_us) / 1e6
    inside = Link(latency_s, (args.link_gbs or LINK_GBS) * 1e9)
    between = Link(latency_s, (args.node_link_gbs or NODE_LINK_GBS) * 1e9)
    size = args.node_gpus or NODE_GPUS
    named = "as given" if args.link_gbs else "nominal: NVLink 4 and 400 Gbit/s a GPU, not measured"
    source = (
        f"rings of up to {size} ranks at {inside.bytes_per_s / 1e9:g} GB/s, between nodes "
        f"{between.bytes_per_s / 1e9:g} GB/s a rank, {latency_s * 1e6:g} us a message; {named}"
    )
    return links.nodes(args.gpus, size, inside, between, source)


def _parameters(model: ModelConfig, vocabulary: str) -> dict:
    parts = {n: {"stored": s, "used": u} for n, (s, u) in plan.parts(model).items()}
    return {"parts": parts, "total": model.n_parameters, "vocabulary": vocabulary}


def _flops(job: plan.Job, steps: int | None, time_limit_s: float | None) -> dict:
    step = plan.step_flops(job)
    return {
        "token": job.model.flops_per_token(),
        "step": step,
        "steps": steps,
        "run": None if steps is None else steps * step,
        "time_limit_s": time_limit_s,
    }


def _memory(job: plan.Job, dtype: torch.dtype, fused: bool) -> dict[str, dict | None]:
    rows = job.share // job.micro_batches
    kept = {
        narrow: activations.activation_bytes(
            job.model, rows, dtype, narrow=narrow, again=job.again, fused=fused
        )
        for narrow in {False, job.width < plan.WIDE}
    }
    return {
        str(stage): {
            **plan.memory(job, stage),
            "activations": kept[stage > 0 and job.width < plan.WIDE],
        }
        if _possible(job, stage)
        else None
        for stage in plan.STAGES
    }


def _possible(job: plan.Job, stage: int) -> bool:
    """Whether a stage has a column; offload changes nothing at stage 0, which is shown without."""
    return plan.refusal(replace(job, offload=False), stage) is None


@dataclass(frozen=True)
class Speeds:
    """What a rank reaches: FLOP/s in training; bytes/s of its memory and of the link to its host's;
    overlap: the share of the communication that computation may hide.
    """

    flops: float
    memory: float
    host: float
    overlap: float


def _speeds(
    args: Namespace, train: TrainConfig, device: torch.device, dtype: torch.dtype, network: Network
) -> tuple[Speeds, list[str]]:
    """The speeds, and where each figure is from: given, measured here, or assumed."""
    together = network.measured and args.gpus > 1  # ranks that share this machine's processors
    if device.type == "cpu" and (args.flops is None or args.memory_gbs is None):
        world.set_threads(1 if together else train.threads)
    name, said = machine.name(device), "as given"
    peak, memory = args.flops, args.memory_gbs
    if peak is None:
        peak, said = world.measured_peak_flops(device, dtype), f"measured here, {name}"
        if together and device.type == "cpu" and args.gpus > world.available_threads():
            peak *= world.available_threads() / args.gpus
            said += f", whose {world.available_threads()} processors {args.gpus} ranks share"
    lines = [f"peak {peak / 1e12:.4g} TFLOP/s a rank: {said}"]
    lines.append(f"MFU {_or(args.mfu, MFU):g}: {_whose(args.mfu)}")
    if memory is None:
        memory = machine.ceilings(device, (), quick=True)["memory_gbps"]
    said = f"measured here, {name}" if args.memory_gbs is None else "as given"
    lines.append(f"memory {memory:.4g} GB/s a rank: {said}")
    if train.offload:
        lines.append(f"host's link {_or(args.host_gbs, HOST_GBS):g} GB/s: {_whose(args.host_gbs)}")
    # Where ranks share processors, those that send are those that compute.
    overlap = _or(args.overlap, 0.0 if network.measured else OVERLAP)
    lines.append(f"links: {network.source}")
    lines.append(f"overlap {overlap:g} of what can run beside computation: {_whose(args.overlap)}")
    if not network.measured:
        lines.append(
            "rings at any size: trees, which take less where latency counts, are not in it"
        )
    lines.append("not in it: stragglers, congestion, failures, input, evaluation")
    flops = peak * _or(args.mfu, MFU)
    return Speeds(flops, 1e9 * memory, 1e9 * _or(args.host_gbs, HOST_GBS), overlap), lines


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _whose(value: float | None) -> str:
    return "assumed, not measured" if value is None else "as given"


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
