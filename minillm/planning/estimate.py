"""Estimate a training run: parameters by part, FLOPs, bytes of a rank, seconds per step.

This is arithmetic alone: nothing is measured, run or sent. hardware.py knows how fast a machine
is, and network.py how long collectives take.
Symbols: N parameters, W ranks, A micro-batches of a rank in a step.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from minillm.config.model import ModelConfig
from minillm.errors import parameter
from minillm.model import size
from minillm.model.block import block_matrices
from minillm.model.injection import injection_matrices, injection_parameters
from minillm.model.linear import Matrix
from minillm.model.norms import norm_parameters
from minillm.model.positions import POSITIONS
from minillm.optim.build import OPTIMIZERS
from minillm.planning.job import WIDE, Job
from minillm.planning.network import Network

STAGES = (0, 1, 2, 3)
BACKWARD = 2 / 3  # share of a step's FLOPs in backward passes
RECOMPUTED = 4 / 3  # with activation checkpointing, which runs the forward pass twice
NEWTON_SCHULZ = 5  # iterations of Newton-Schulz in Muon
# Bytes per element that an AdamW step moves: weight, gradient and two moments are read, and all
# but the gradient are written.
MOVED = 7 * WIDE
SMALL_SUMS = 2  # all-reduces of one or two numbers in a step: the loss, the gradient norm


def parts(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return {part: (parameters stored, parameters used in a pass at the mean recurrence)}.

    The stored ones add up to those of the model. A tied head stores nothing and uses its matrix.
    """
    embedding = size.n_embedding_parameters(model)
    prelude, core, coda = model.depths
    r = model.mean_recurrence if core else 1
    norm, block = norm_parameters(model), size.n_block_parameters(model)
    found = {"embedding": (embedding, embedding)}
    if positions := POSITIONS[model.position].parameters(model):
        found["positions"] = (positions, positions)
    if not core:
        found["blocks"] = (prelude * block,) * 2
    else:
        once, each = injection_parameters(model)
        found["prelude"] = (prelude * block,) * 2
        found["injection"] = (once + each, once + r * each)
        found["core"] = (core * block, r * core * block)
        found["coda"] = (coda * block,) * 2
    found["norm"] = (norm, 2 * norm if core else norm)
    found["head"] = (0 if model.tie_embeddings else embedding, embedding)
    return found


def units(model: ModelConfig) -> list[int]:
    """Return the parameters of each unit that stage 3 gathers at once.

    The units are each block of prelude and coda, the whole core, and everything else.
    """
    prelude, core, coda = model.depths
    block = size.n_block_parameters(model)
    found = [block] * (prelude + coda) + [core * block] * (core > 0)
    return [*found, size.n_parameters(model) - model.n_layer * block]


def muon_parameters(model: ModelConfig) -> int:
    """Return the number of parameters that Muon moves: the matrices of blocks and injection."""
    return size.n_inner_matrix_parameters(model)


def step_flops(job: Job) -> float:
    """Return FLOPs of a step over all ranks, at the mean recurrence.

    The second forward pass of activation checkpointing is not included.
    """
    return size.flops_per_token(job.model) * job.tokens


def refusal(job: Job, stage: int) -> str | None:
    """Return the reason why a job cannot run at a ZeRO stage, or None if it can.

    job: run to be planned
    stage: ZeRO stage, 0 to 3
    """
    if stage == 3 and OPTIMIZERS[job.optimizer].whole:
        return (
            f"{parameter('zero')} 3 shards matrices, which Muon needs whole; use "
            f"{parameter('zero')} 2 or {parameter('optimizer')} adamw"
        )
    if stage == 0 and job.offload:
        return f"{parameter('offload')} needs {parameter('zero')} 1 or 2; add one"
    return None


def memory(job: Job, stage: int) -> dict[str, float]:
    """Return bytes of a rank by kind. "host" is in the host's memory, the others on the device.

        stage  parameters  gradients  masters  moments  buffers
        0      4 N         4 N                 8 N
        1      w N         4N + 4N/W  4 N/W    8 N/W
        2      w N         4 N/W      4 N/W    8 N/W    two buckets of 25 MiB
        3      4 N/W       4 N/W               8 N/W    the largest unit, gathered, twice: 2 w U

    w: bytes of the compute dtype; at 4 the masters are the parameters themselves
    Moments of Muon's matrices take 4 N. An average of the weights adds 4 N. Offloading moves
    masters and moments to the host.
    Not counted are padding (less than 1 % in models that are worth sharding), temporary copies of
    gloo, NCCL and FSDP2, and activations.

    job: run to be planned
    stage: ZeRO stage, 0 to 3
    """
    N, W, w = size.n_parameters(job.model), job.ranks, job.width
    share = N if stage == 0 else N / W
    kind, matrices = OPTIMIZERS[job.optimizer], muon_parameters(job.model)
    moments = kind.matrix_copies * matrices + kind.other_copies * (N - matrices)
    found = {
        "parameters": (WIDE * N, w * N, w * N, WIDE * N / W)[stage],
        "gradients": (WIDE * N, WIDE * (N + N / W), WIDE * N / W, WIDE * N / W)[stage],
        "masters": WIDE * share if stage in (1, 2) and w != WIDE else 0,
        "moments": WIDE * moments * share / N,
        "average": WIDE * N if job.average else 0,
        "buffers": (0, 0, 2 * min(job.bucket_bytes, WIDE * N), 2 * w * max(units(job.model)))[
            stage
        ],
        "host": 0,
    }
    if job.offload and stage in (1, 2):
        found |= {"host": found["moments"] + WIDE * share, "moments": 0, "masters": 0}
    return found


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a step.

    collective: "all_reduce", "reduce_scatter" or "all_gather"
    n_bytes: bytes of each
    count: number of them
    hidden: whether they can run during the computation
    """

    collective: str
    n_bytes: float
    count: int
    hidden: bool


def traffic(job: Job, stage: int) -> list[Traffic]:
    """Return the collectives of a step.

        stage  gradients, in fp32                 parameters, in the compute dtype
        0      all-reduce once a step
        1      reduce-scatter once a step         all-gather after the step
        2      reduce-scatter each micro-batch    all-gather after the step
        3      reduce-scatter each micro-batch    all-gather in each forward and backward pass

    They run in buckets of bucket_bytes, at stage 3 unit by unit.

    job: run to be planned
    stage: ZeRO stage, 0 to 3
    """
    if job.ranks == 1:
        return []
    N, A = size.n_parameters(job.model), job.micro_batches
    small = Traffic("all_reduce", 8, SMALL_SUMS, False)
    if stage == 3:
        pieces = units(job.model)
        mean = N / len(pieces)
        return [
            Traffic("all_gather", job.width * mean, 2 * A * len(pieces), True),
            Traffic("reduce_scatter", WIDE * mean, A * len(pieces), True),
            small,
        ]
    buckets = max(1, math.ceil(WIDE * N / job.bucket_bytes))
    bucket = N / buckets
    if stage == 0:
        return [Traffic("all_reduce", WIDE * bucket, buckets, True), small]
    return [
        Traffic("reduce_scatter", WIDE * bucket, buckets * (A if stage == 2 else 1), True),
        Traffic("all_gather", job.width * bucket, buckets, False),
        small,
    ]


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    compute_s: forward and backward passes
    communication_s: all communication
    exposed_s: communication that no computation hides
    optimizer_s: step of the optimizer
    """

    compute_s: float
    communication_s: float
    exposed_s: float
    optimizer_s: float

    @property
    def total_s(self) -> float:
        """Return the seconds of the whole step."""
        return self.compute_s + self.exposed_s + self.optimizer_s


def step_time(
    job: Job,
    stage: int,
    network: Network,
    compute_s: float,
    optimizer_s: float = 0.0,
    overlap: float = 0.0,
) -> StepTime:
    """Return the time of a step, from that of its parts.

        T = compute + max(0, overlap H - window) + (1 - overlap) H + E + optimiser

    H is the communication that can run during the computation, and E the rest. The window is the
    computation that can hide H: the last micro-batch's backward pass at stages 0 and 1, all
    backward passes at stage 2, everything at stage 3. There the first two terms are
    max(compute, overlap H).

    job: run to be planned
    stage: ZeRO stage, 0 to 3
    network: links between the ranks
    compute_s: seconds of the forward and backward passes of all micro-batches, measured or from
        `compute_seconds`
    optimizer_s: seconds of the optimizer's step
    overlap: share of H that does run during the computation
    """
    during = after = 0.0
    for t in traffic(job, stage):
        seconds = t.count * network.seconds(t.collective, t.n_bytes)
        during, after = during + seconds * t.hidden, after + seconds * (not t.hidden)
    share = (BACKWARD / job.micro_batches, BACKWARD / job.micro_batches, BACKWARD, 1.0)[stage]
    exposed = max(0.0, overlap * during - share * compute_s) + (1 - overlap) * during + after
    return StepTime(compute_s, during + after, exposed, optimizer_s)


def compute_seconds(job: Job, flops_per_s: float) -> float:
    """Return seconds of the forward and backward passes of a rank's sequences.

    job: run to be planned
    flops_per_s: FLOP/s that a rank reaches
    """
    return (RECOMPUTED if job.again else 1) * step_flops(job) / (job.ranks * flops_per_s)


def optimizer_seconds(
    job: Job, stage: int, flops_per_s: float, bytes_per_s: float, host_bytes_per_s: float
) -> float:
    """Return seconds of the optimizer's step on the parameters that a rank keeps.

    An element moves 28 bytes, and w more for the copy in a narrow dtype. Muon adds the products of
    Newton-Schulz. Offloading moves 4 bytes per element down and w up over the link to the host.

    job: run to be planned
    stage: ZeRO stage, 0 to 3
    flops_per_s: FLOP/s that a rank reaches
    bytes_per_s: bandwidth of its memory
    host_bytes_per_s: bandwidth of its link to the host's memory
    """
    n = size.n_parameters(job.model) / (job.ranks if stage else 1)
    narrow = stage > 0 and job.width != WIDE
    seconds = (MOVED + (job.width if narrow else 0)) * n / bytes_per_s
    if job.optimizer == "muon":
        seconds += newton_schulz_flops(job.model) / (job.ranks if stage else 1) / flops_per_s
    if job.offload and stage:
        seconds += (WIDE + job.width) * n / host_bytes_per_s
    return seconds


def newton_schulz_flops(model: ModelConfig) -> float:
    """Return FLOPs of orthogonalising all of Muon's matrices in one step.

    One of m <= M rows and columns takes 5 (4 m^2 M + 2 m^3).
    """
    block, others = block_matrices(model).values(), injection_matrices(model).values()
    return float(model.n_layer * _newton_schulz(block) + _newton_schulz(others))


def _newton_schulz(matrices: Iterable[Matrix]) -> int:
    sides = [sorted((rows, m.columns)) for m in matrices for rows in m.rows]
    return sum(NEWTON_SCHULZ * (4 * m**2 * M + 2 * m**3) for m, M in sides)
