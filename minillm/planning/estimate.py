"""What a training takes before it runs: parameters by part, FLOPs, bytes of a rank, seconds a step.

Arithmetic alone: nothing is measured, run or sent. N parameters, W ranks, A micro-batches of a rank
in a step. What this file does not do: know how fast a machine is (hardware.py), or how
collectives travel (links.py).
"""

import math
from dataclasses import dataclass, replace

from minillm.config.model import INJECTED, ModelConfig
from minillm.errors import UsageError
from minillm.optim.build import OPTIMIZERS
from minillm.planning.network import Network

STAGES = (0, 1, 2, 3)
WIDE = 4  # bytes of fp32: gradients, masters, moments
BACKWARD = 2 / 3  # of a step's FLOPs
AGAIN = 4 / 3  # with activation checkpointing: the forward pass once more
NEWTON_SCHULZ = 5  # iterations of Muon's
# Bytes an element moves in an AdamW step: weight, gradient and two moments in, all but one out.
MOVED = 7 * WIDE
SMALL_SUMS = 2  # a step's all-reduces of a number or two: the loss, the gradients' norm


@dataclass(frozen=True)
class Job:
    """What is planned. Raises UsageError if the sequences cannot be shared out evenly.

    batch_size: sequences a step over all ranks.    micro_batch: of a rank at a time; None: all its
    own.    width: bytes of the computation's dtype.    average: --ema.    again: activation
    checkpointing.    bucket_bytes: of gradients that travel together.
    """

    model: ModelConfig
    ranks: int = 1
    batch_size: int = 64
    micro_batch: int | None = None
    width: int = WIDE
    optimizer: str = "adamw"
    average: bool = False
    offload: bool = False
    again: bool = False
    bucket_bytes: int = 25 << 20

    def __post_init__(self) -> None:
        if self.batch_size % self.ranks:
            raise UsageError(
                f"--batch-size {self.batch_size} is not divisible by {self.ranks} ranks; "
                f"nearest: {max(1, round(self.batch_size / self.ranks)) * self.ranks}"
            )
        if self.share % (self.micro_batch or 1):
            raise UsageError(
                f"--micro-batch-size {self.micro_batch} does not divide the {self.share} sequences "
                f"of each of {self.ranks} ranks"
            )

    @property
    def share(self) -> int:
        """Sequences of a rank in a step."""
        return self.batch_size // self.ranks

    @property
    def micro_batches(self) -> int:
        """Of a rank in a step."""
        return self.share // (self.micro_batch or self.share)

    @property
    def tokens(self) -> int:
        """Of all ranks in a step."""
        return self.batch_size * self.model.seq_len


def parts(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """{part: (parameters stored, parameters used in a pass at the mean recurrence)}.

    What is stored adds up to model.n_parameters; a tied head stores nothing and uses its matrix.
    """
    V, C = model.vocab_size or 0, model.d_model
    prelude, core, coda = model.depths
    r = model.mean_recurrence if core else 1
    norm, block = _norm(model), _block(model)
    found = {"embedding": (V * C, V * C)}
    if model.position == "learned":
        found["positions"] = (model.seq_len * C,) * 2
    if not core:
        found["blocks"] = (prelude * block,) * 2
    else:
        text = 0 if model.injection == "add" else C * C  # once a pass ...
        text += norm if model.recurrence_style == "parcae" else 0
        state = {"concat": C * C, "diagonal": 2 * C, "add": 0}[model.injection]  # ... and r times
        found["prelude"] = (prelude * block,) * 2
        found["injection"] = (text + state, text + r * state)
        found["core"] = (core * block, r * core * block)
        found["coda"] = (coda * block,) * 2
    found["norm"] = (norm, 2 * norm if core else norm)
    found["head"] = (0 if model.tie_embeddings else V * C, V * C)
    return found


def _norm(model: ModelConfig) -> int:
    return (2 if model.bias and model.norm == "layernorm" else 1) * model.d_model


def _block(model: ModelConfig) -> int:
    """Parameters of a block, norms and biases with it: what one more of them adds."""
    if model.recurrent is None:
        one, two = (replace(model, n_layer=n) for n in (1, 2))
    else:
        one, two = (replace(model, recurrent=f"0,{n},0") for n in (1, 2))
    return two.n_parameters - one.n_parameters


def units(model: ModelConfig) -> list[int]:
    """Parameters of what stage 3 gathers at once: each block, the core whole, and all the rest."""
    prelude, core, coda = model.depths
    block = _block(model)
    found = [block] * (prelude + coda) + [core * block] * (core > 0)
    return [*found, model.n_parameters - model.n_layer * block]


def muon_parameters(model: ModelConfig) -> int:
    """Parameters of the matrices that Muon moves: of the blocks and the injection."""
    return model.n_matrix_parameters - (model.vocab_size or 0) * model.d_model


def step_flops(job: Job) -> float:
    """FLOPs of a step over all ranks, at the mean recurrence; without what is computed again."""
    return job.model.flops_per_token() * job.tokens


def refusal(job: Job, stage: int) -> str | None:
    """Why a job cannot run at a stage, in a line; None if it can."""
    if stage == 3 and OPTIMIZERS[job.optimizer].whole:
        return (
            "--zero 3 shards matrices, which Muon needs whole; take --zero 2 or --optimizer adamw"
        )
    if stage == 0 and job.offload:
        return "--offload moves a rank's share of the optimiser; add --zero 1 or 2"
    return None


def memory(job: Job, stage: int) -> dict[str, float]:
    """Bytes of a rank by kind; "host" is beside them, in the host's memory.

        stage  parameters  gradients  masters  moments  buffers
        0      4 N         4 N                 8 N
        1      w N         4N + 4N/W  4 N/W    8 N/W
        2      w N         4 N/W      4 N/W    8 N/W    two buckets of 25 MiB
        3      4 N/W       4 N/W               8 N/W    the largest unit, gathered, twice: 2 w U

    w: bytes of the computation's dtype; at 4 the masters are the parameters themselves. Moments of
    Muon's matrices are 4 N. --ema adds 4 N. --offload moves masters and moments. Not counted:
    padding (less than 1 % of models worth sharding), what gloo, NCCL and FSDP2 copy on the way,
    activations.
    """
    N, W, w = job.model.n_parameters, job.ranks, job.width
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
    """Collectives of one kind in a step. n_bytes: of each; count: how many.

    hidden: whether they run beside the computation.
    """

    collective: str
    n_bytes: float
    count: int
    hidden: bool


def traffic(job: Job, stage: int) -> list[Traffic]:
    """What a step sends.

        0  gradients, fp32: all-reduce, once a step
        1  gradients: reduce-scatter, once a step; parameters: all-gather after it
        2  gradients: reduce-scatter in each micro-batch; parameters: all-gather after the step
        3  parameters: all-gather in each forward and each backward; gradients: reduce-scatter in
           each micro-batch

    In buckets of bucket_bytes, at stage 3 unit by unit.
    """
    if job.ranks == 1:
        return []
    N, A = job.model.n_parameters, job.micro_batches
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
    """Seconds of a step. exposed_s: of the communication, what nothing hides."""

    compute_s: float
    communication_s: float
    exposed_s: float
    optimizer_s: float

    @property
    def total_s(self) -> float:
        """What the step takes."""
        return self.compute_s + self.exposed_s + self.optimizer_s


def step_time(
    job: Job,
    stage: int,
    network: Network,
    compute_s: float,
    optimizer_s: float = 0.0,
    overlap: float = 0.0,
) -> StepTime:
    """The time of a step from that of its parts.

        T = compute + max(0, overlap H - window) + (1 - overlap) H + E + optimiser

    H: communication that can run beside the computation; E: the rest.    overlap: the share of H
    that does.    window: the computation it can hide behind: the last micro-batch's backward at
    stages 0 and 1, all backward passes at 2, everything at 3; then the first two terms are
    max(compute, overlap H).    compute_s: forward and backward passes of all micro-batches, as
    measured or from `compute_seconds`.
    """
    beside = after = 0.0
    for t in traffic(job, stage):
        seconds = t.count * network.seconds(t.collective, t.n_bytes)
        beside, after = beside + seconds * t.hidden, after + seconds * (not t.hidden)
    share = (BACKWARD / job.micro_batches, BACKWARD / job.micro_batches, BACKWARD, 1.0)[stage]
    exposed = max(0.0, overlap * beside - share * compute_s) + (1 - overlap) * beside + after
    return StepTime(compute_s, beside + after, exposed, optimizer_s)


def compute_seconds(job: Job, flops_per_s: float) -> float:
    """Forward and backward passes of a rank's sequences.    flops_per_s: what a rank reaches."""
    return (AGAIN if job.again else 1) * step_flops(job) / (job.ranks * flops_per_s)


def optimizer_seconds(
    job: Job, stage: int, flops_per_s: float, bytes_per_s: float, host_bytes_per_s: float
) -> float:
    """The optimiser's step on what a rank keeps.

    28 bytes moved an element (and w for the copy in a narrow dtype), with Muon the products of
    Newton-Schulz; with --offload also 4 bytes an element down and w up over the host's link.
    """
    n = job.model.n_parameters / (job.ranks if stage else 1)
    narrow = stage > 0 and job.width != WIDE
    seconds = (MOVED + (job.width if narrow else 0)) * n / bytes_per_s
    if job.optimizer == "muon":
        seconds += newton_schulz_flops(job.model) / (job.ranks if stage else 1) / flops_per_s
    if job.offload and stage:
        seconds += (WIDE + job.width) * n / host_bytes_per_s
    return seconds


def newton_schulz_flops(model: ModelConfig) -> float:
    """Of all of Muon's matrices: 5 (4 m^2 M + 2 m^3) for one of m <= M rows and columns."""
    C, D = model.d_model, model.d_head
    q, kv = model.n_head * D, model.n_kv_head * D
    ups = 2 if model.gated else 1
    block = [(q, C), (kv, C), (kv, C), (C, q), *[(model.d_ff, C)] * ups, (C, model.d_ff)]
    squares = INJECTED.get(model.injection, 0) if model.recurrent else 0
    shapes = block * model.n_layer + [(C, C)] * squares
    return float(sum(
        NEWTON_SCHULZ * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in shapes
    ))  # fmt: skip
