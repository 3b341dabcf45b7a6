"""Judge a planned job: whether it fits, the largest micro-batch that fits, and advice.

This is arithmetic alone, as in estimate.py and activations.py; nothing is allocated. hardware.py
finds out how much memory there is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from minillm.planning import activations
from minillm.planning.cards import CARDS, GIB
from minillm.planning.estimate import STAGES, memory, refusal
from minillm.planning.job import WIDE, Job

MOST_GPUS = 1024  # more are never advised


@dataclass(frozen=True)
class Capacity:
    """Memory of one rank.

    total: bytes that it has; None where that is unknown
    share: share of it that tensors may take
    reason: use of the rest, or the source of `share`
    """

    total: float | None
    share: float
    reason: str

    @property
    def usable(self) -> float:
        """Bytes that tensors may take; infinity where the total is unknown."""
        return float("inf") if self.total is None else self.share * self.total


@dataclass(frozen=True)
class Budget:
    """Memory that a job needs, at any stage and micro-batch.

    dtype: compute dtype
    fused: whether attention is fused, see activations.activation_line
    capacity: memory of one rank
    """

    dtype: torch.dtype
    fused: bool
    capacity: Capacity
    _lines: dict = field(default_factory=dict, compare=False, repr=False)

    def activations(self, job: Job, stage: int, rows: int) -> float | None:
        """Return bytes of activations that sequences keep, or None if they cannot be counted.

        job: run to be planned
        stage: ZeRO stage, 0 to 3
        rows: number of sequences
        """
        narrow = stage > 0 and job.width < WIDE
        key = (narrow, job.again)
        if key not in self._lines:
            self._lines[key] = activations.activation_line(
                job.model, self.dtype, narrow=narrow, again=job.again, fused=self.fused
            )
        line = self._lines[key]
        return None if line is None else line[0] + (rows - 1) * line[1]

    def parts(self, job: Job, stage: int) -> dict[str, float | None]:
        """Return bytes of a rank by kind, as estimate.memory does, with "activations" added.

        job: run to be planned
        stage: ZeRO stage, 0 to 3
        """
        rows = job.share // job.micro_batches
        return {**memory(job, stage), "activations": self.activations(job, stage, rows)}

    def needed(self, job: Job, stage: int, rows: int | None = None) -> float | None:
        """Return bytes that a rank needs, or None if they cannot be counted.

        job: run to be planned
        stage: ZeRO stage, 0 to 3
        rows: sequences of a micro-batch; default: the job's
        """
        rows = rows or job.share // job.micro_batches
        kept = self.activations(job, stage, rows)
        if kept is None:
            return None
        return kept + sum(n for kind, n in memory(job, stage).items() if kind != "host")

    def fits(self, job: Job, stage: int, rows: int | None = None) -> bool | None:
        """Return whether the job fits, or None if its memory or the capacity is unknown.

        job, stage, rows: see `needed`
        """
        needed = self.needed(job, stage, rows)
        if needed is None or self.capacity.total is None:
            return None
        return needed <= self.capacity.usable

    def most_rows(self, job: Job, stage: int) -> int | None:
        """Return the number of sequences that fit at a time in a batch of any size, or None.

        job: run to be planned
        stage: ZeRO stage, 0 to 3
        """
        one, two = self.needed(job, stage, 1), self.needed(job, stage, 2)
        if one is None or two is None or self.capacity.total is None:
            return None
        if one > self.capacity.usable:
            return 0
        return 1 + int((self.capacity.usable - one) // (two - one))

    def largest(self, job: Job, stage: int) -> int | None:
        """Return the largest micro-batch that fits and divides a rank's sequences; 0: none fits.

        job: run to be planned
        stage: ZeRO stage, 0 to 3
        """
        most = self.most_rows(job, stage)
        if most is None:
            return None
        divisors = (d for d in range(min(most, job.share), 0, -1) if job.share % d == 0)
        return next(divisors, 0)


@dataclass(frozen=True)
class Verdict:
    """Verdict on a job at its stage. Sizes are in bytes of one rank.

    fits: whether the job fits; None where the memory or the need is unknown
    largest: the largest micro-batch that fits; 0: none
    most: number of sequences that would fit at a time if the batch were larger
    advice: flags; each of them alone would make it fit
    """

    fits: bool | None
    needed: float | None
    capacity: Capacity
    micro: int
    largest: int | None
    most: int | None
    advice: tuple[str, ...]

    @property
    def raw(self) -> Mapping[str, object]:
        """The verdict as plain values, for --json."""
        total = self.capacity.total
        return {
            "fits": self.fits,
            "needed_bytes": self.needed,
            "capacity_bytes": total,
            "usable_bytes": None if total is None else self.capacity.usable,
            "micro_batch": self.micro,
            "largest_micro_batch": self.largest,
            "most_sequences": self.most,
            "advice": list(self.advice),
        }


def judge(budget: Budget, job: Job, stage: int, card: str | None = None) -> Verdict:
    """Return the verdict on a job.

    budget: memory that jobs need, and the capacity
    job: run to be planned
    stage: ZeRO stage, 0 to 3
    card: name of the card; larger cards are part of the advice
    """
    fits = budget.fits(job, stage)
    advice = tuple(_advice(budget, job, stage, card)) if fits is False else ()
    return Verdict(
        fits, budget.needed(job, stage), budget.capacity, job.share // job.micro_batches,
        budget.largest(job, stage), budget.most_rows(job, stage), advice,
    )  # fmt: skip


def _advice(budget: Budget, job: Job, stage: int, card: str | None) -> Iterator[str]:
    """Yield changes of flags, each of which was tried and makes the job fit."""
    rows, found = job.share // job.micro_batches, False
    largest = budget.largest(job, stage) or 0
    if largest:
        found = True
        yield f"--micro-batch-size {largest}"
    above = STAGES[stage + 1 :] if job.ranks > 1 else ()
    higher = [s for s in above if not refusal(job, s)]
    if (better := next((s for s in higher if budget.fits(job, s)), None)) is not None:
        found = True
        yield f"--zero {better}"
    again = replace(job, again=True)
    if not job.again and budget.fits(again, stage):
        found = True
        yield "--activation-checkpointing"
    ranks = 2 * job.ranks
    while stage and ranks <= MOST_GPUS and job.batch_size % (ranks * rows) == 0:
        if budget.fits(replace(job, ranks=ranks, micro_batch=rows), stage):
            found = True
            yield f"--gpus {ranks}"
            break
        ranks *= 2
    if not found and (most := max([stage, *higher])) > stage and budget.largest(again, most):
        found = True
        yield f"--zero {most} --activation-checkpointing --micro-batch-size 1"
    elif not found and budget.largest(again, stage):
        found = True
        yield "--activation-checkpointing --micro-batch-size 1"
    larger = sorted(
        (c.memory_gib, c.name) for c in CARDS
        if card and c.memory_gib * GIB > (budget.capacity.total or 0)
    )  # fmt: skip
    for gib, name in larger:
        capacity = replace(budget.capacity, total=gib * GIB)
        if replace(budget, capacity=capacity).fits(job, stage):
            yield f"--gpu {name}"
            return
    if not found:
        yield "a smaller model or a smaller --seq-len"
