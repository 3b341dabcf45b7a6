"""Find the machine of a planned rank: a card of the table, this machine, or given figures.

Each figure comes with a sentence on its source, so that figures of two machines are never mixed
unnoticed.
"""

from argparse import Namespace
from dataclasses import dataclass

import torch

from minillm.config.train import TrainConfig
from minillm.errors import UnavailableError, UsageError, parameter
from minillm.planning import cards, network
from minillm.planning.cards import GIB, HOST_GBS, LATENCY_US, MFU, NODE_GPUS, OVERLAP, Card
from minillm.planning.fit import Capacity
from minillm.planning.network import Link, Network
from minillm.runtime import ceilings, device
from minillm.runtime.units import digits, si, size

# For GPUs that are not in the table: one direction, GB/s.
PCIE_GBS, NETWORK_GBS = 32.0, 1.5625
USABLE_GPU = 0.9  # share of a GPU's memory; CUDA, NCCL and fragmentation take the rest
USABLE_CPU = 0.5  # share of a CPU's free memory, the same as microbatch.SHARE


@dataclass(frozen=True)
class Speeds:
    """Speeds that a rank reaches.

    flops: FLOP/s in training, which is the peak times the MFU
    peak_flops: FLOP/s that the processor can do at most
    memory: bytes/s of its memory
    host: bytes/s of its link to the host's memory
    overlap: share of the communication that computation may hide
    """

    flops: float
    peak_flops: float
    memory: float
    host: float
    overlap: float


@dataclass(frozen=True)
class Hardware:
    """The machine that a job is planned for.

    name: name of one rank's processor
    kind: "GPU" or "CPU"
    card: its row in the table, if it has one
    measured: whether the speed of the arithmetic was measured here
    notes: one sentence on the source of each figure
    """

    name: str
    kind: str
    card: Card | None
    dtype: torch.dtype
    capacity: Capacity
    speeds: Speeds
    network: Network
    measured: bool
    notes: tuple[str, ...]


def is_described(args: Namespace) -> bool:
    """Return whether the flags describe a GPU that need not be in this machine."""
    return args.gpu is not None or None not in (args.flops, args.memory_gbs)


def check(args: Namespace) -> Card | None:
    """Return the card that --gpu names, or None.

    args: flags of `minillm plan`
    Raises UsageError if flags exclude each other or would mix figures of this machine with those of
    another one, such as a laptop's processor with a GPU's links. Raises UnavailableError for
    --device cuda without a GPU.
    """
    name = args.device or "auto"
    if args.gpu is not None:
        if name.partition(":")[0] not in ("auto", "cuda"):
            raise UsageError(
                f"{parameter('gpu')} {args.gpu} and {parameter('device')} {name} exclude each "
                "other; drop one"
            )
        return cards.find(args.gpu)
    if torch.cuda.is_available() and name.partition(":")[0] in ("auto", "cuda"):
        return None
    known = ", ".join(cards.NAMES)
    if (args.flops is None) != (args.memory_gbs is None):
        one, other = map(parameter, ("flops", "memory_gbs")[:: 1 if args.flops else -1])
        raise UsageError(
            f"{one} without {other} would mix another machine with this one; give both, or name "
            f"the card with {parameter('gpu')}: {known}"
        )
    wanted = name.partition(":")[0] == "cuda" and args.flops is None
    alone = args.gpus == 1 or args.links or (args.flops and args.link_gbs)
    if wanted:
        raise UnavailableError(
            f"{parameter('device')} {name}: there is no GPU here; use {parameter('device')} cpu, "
            f"or name the card to plan for with {parameter('gpu')}: {known}"
        )
    if not alone:
        raise UsageError(
            f"{parameter('gpus')} {args.gpus}: there is no GPU here to plan for; name the card "
            f"with {parameter('gpu')}: {known}; or give {parameter('flops')}, "
            f"{parameter('memory_gbs')} and {parameter('link_gbs')}"
        )
    return None


def describe(args: Namespace, train: TrainConfig, card: Card | None, width: int) -> Hardware:
    """Return the machine that the flags describe, or this one, measured.

    args: flags of `minillm plan`
    train: settings of the training
    card: result of `check`
    width: width of the model, by which training picks its dtype
    """
    if is_described(args):
        return _described(args, train, card)
    return _here(args, train, width)


def _described(args: Namespace, train: TrainConfig, card: Card | None) -> Hardware:
    """Return a GPU from the table, or one whose figures the flags give."""
    word = train.dtype
    if word == "auto":
        word = "fp16" if card and not card.has_bf16 else "bf16"
    sheet = card.source if card else ""
    peak = args.flops or card.peak_flops(word)
    memory = args.memory_gbs or card.memory_gbs
    gib = args.memory_gib or (card.memory_gib if card else None)
    name = card.title if card else "a GPU as given"
    notes = [f"hardware: {name}; data sheet figures, not measured: {sheet}"] if card else []
    notes.append(
        f"peak {si(peak, 'FLOP/s')} in {word}, dense: {_of(args.flops, 'data sheet')}; "
        f"memory {si(1e9 * memory, 'B/s')}: {_of(args.memory_gbs, 'data sheet')}"
    )
    if card and not card.runs_triton:
        notes.append(
            f"kernels: eager; Triton's need sm_80, and this card is sm_{card.capability[0]}"
            f"{card.capability[1]}"
        )
        if train.kernels == "triton":
            raise UsageError(
                f"{parameter('kernels')} triton: {name} is older than sm_80, the oldest supported; "
                f"use {parameter('kernels')} auto"
            )
    capacity = _gpu_memory(None if gib is None else gib * GIB, notes)
    links = _network(args, card)
    speeds = _speeds(args, train, peak, 1e9 * memory, links, notes)
    dtype = device.DTYPES[word]
    return Hardware(name, "GPU", card, dtype, capacity, speeds, links, False, tuple(notes))


def _here(args: Namespace, train: TrainConfig, width: int) -> Hardware:
    """Return this machine, measured as far as the flags do not say otherwise."""
    here = device.pick_device(train.device)
    on_gpu = here.type == "cuda"
    dtype = device.pick_dtype(train.dtype, here, width)
    together = bool(args.links) and args.gpus > 1  # ranks that share this machine's processors
    if here.type == "cpu":
        device.set_threads(1 if together else train.threads)
    name, notes = ceilings.name(here), []
    peak, said = args.flops, _of(args.flops, f"measured here, {name}")
    if peak is None:
        peak = device.measured_peak_flops(here, dtype)
    threads = device.available_threads()
    if together and here.type == "cpu" and args.gpus > threads:
        peak *= threads / args.gpus
        said += f", whose {threads} processors {args.gpus} ranks share"
    memory = args.memory_gbs
    if memory is None:
        memory = ceilings.ceilings(here, (), quick=True)["memory_gbps"]
    notes.append(
        f"peak {si(peak, 'FLOP/s')} per rank: {said}; "
        f"memory {si(1e9 * memory, 'B/s')}: {_of(args.memory_gbs, 'measured here')}"
    )
    if on_gpu:
        total = torch.cuda.get_device_properties(here).total_memory
        card = cards.of_device(name, total)
        capacity = _gpu_memory(args.memory_gib * GIB if args.memory_gib else total, notes)
    else:
        card = None
        free = args.memory_gib * GIB if args.memory_gib else device.available_memory(here)
        total = None if free is None else free / args.gpus
        reason = f"{_percent(USABLE_CPU)} of the memory that is free here now, as training takes it"
        capacity = Capacity(total, USABLE_CPU, reason)
    links = _network(args, card)
    speeds = _speeds(args, train, peak, 1e9 * memory, links, notes)
    kind = "GPU" if on_gpu else "CPU"
    return Hardware(name, kind, card, dtype, capacity, speeds, links, True, tuple(notes))


def _gpu_memory(total: float | None, notes: list[str]) -> Capacity:
    reason = f"{_percent(1 - USABLE_GPU)} left for CUDA, NCCL and fragmentation: assumed"
    if total is None:
        notes.append("memory of the GPU: not known, so no verdict; --memory-gib says how much")
    return Capacity(total, USABLE_GPU, reason)


def _speeds(
    args: Namespace,
    train: TrainConfig,
    peak: float,
    memory: float,
    links: Network,
    notes: list[str],
) -> Speeds:
    """Return what a rank reaches in training, and add to `notes` what is assumed about it."""
    mfu = MFU if args.mfu is None else args.mfu
    notes.append(f"training reaches {_percent(mfu)} of the peak (--mfu): {_of(args.mfu)}")
    host = args.host_gbs or HOST_GBS
    if train.offload:
        notes.append(f"link to the host's memory {digits(host)} GB/s: {_of(args.host_gbs)}")
    # Ranks that share processors send with the ones that compute.
    overlap = (0.0 if links.measured else OVERLAP) if args.overlap is None else args.overlap
    if links.ranks > 1:
        notes.append(f"links: {links.source}")
        notes.append(
            f"{_percent(overlap)} of the communication that can run during the computation does so "
            f"(--overlap): {_of(args.overlap)}"
        )
    if not links.measured:
        notes.append(
            "collectives are rings at any size; trees, which take less time where latency counts, "
            "are left out"
        )
    notes.append("left out: stragglers, congestion, failures, reading of data, evaluation")
    return Speeds(peak * mfu, peak, memory, 1e9 * host, overlap)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _of(given: float | None, otherwise: str = "assumed, not measured") -> str:
    return otherwise if given is None else "as given"


def _network(args: Namespace, card: Card | None) -> Network:
    """Return what connects the ranks: as given, as measured by fit.py, or of the card's sheet."""
    if args.gpus == 1:
        return network.alone()
    if args.links:
        return network.read(args.links, args.gpus)
    per_node = args.node_gpus or NODE_GPUS
    inside_gbs = args.link_gbs or (card.link_gbs if card else PCIE_GBS)
    between_gbs = args.node_link_gbs or (card.network_gbs if card else NETWORK_GBS)
    latency_s = (LATENCY_US if args.latency_us is None else args.latency_us) / 1e6
    kind = "as given" if args.link_gbs else f"{card.link if card else 'PCIe 4.0 x16'}, nominal"
    source = f"{digits(inside_gbs)} GB/s in one direction between the GPUs of a node ({kind})"
    if args.gpus > per_node:
        net = card.network if card else "one port of 100 Gbit/s for 8 GPUs"
        net = "as given" if args.node_link_gbs else f"assumed: {net}"
        source += f"; nodes of {per_node}, {digits(between_gbs)} GB/s per GPU between nodes ({net})"
    source += f"; {digits(latency_s * 1e6)} us per message: {_of(args.latency_us)}"
    inside, between = Link(latency_s, inside_gbs * 1e9), Link(latency_s, between_gbs * 1e9)
    return network.nodes(args.gpus, per_node, inside, between, source)


def raw(found: Hardware) -> dict[str, object]:
    """Return the machine as plain values in base units, for --json."""
    return {
        "name": found.name,
        "card": found.card.name if found.card else None,
        "kind": found.kind,
        "dtype": str(found.dtype).removeprefix("torch."),
        "peak_flops_per_s": found.speeds.peak_flops,
        "memory_bytes_per_s": found.speeds.memory,
        "memory_bytes": found.capacity.total,
        "measured": found.measured,
        "source": found.card.source if found.card and not found.measured else None,
    }


def in_words(found: Hardware, ranks: int, per_node: int | None) -> str:
    """Return a description of the machine, such as "64 x H100 SXM 80 GB in 8 nodes of 8".

    found: machine of one rank
    ranks: number of ranks
    per_node: ranks of a node; None: 8
    """
    per_node = per_node or NODE_GPUS
    if found.kind == "CPU":
        return f"this machine, {found.name}" + (f", {ranks} ranks" if ranks > 1 else "")
    nodes = f" in {ranks // per_node} nodes of {per_node}" if ranks > per_node else ""
    return f"{ranks} x {found.name}{nodes}"


def memory_in_words(capacity: Capacity) -> str:
    """Return the memory of a rank: "79.1 GiB, of which tensors may take 71.2 GiB (reason)"."""
    if capacity.total is None:
        return "unknown"
    return f"{size(capacity.total)}, of which tensors may take {size(capacity.usable)}"
