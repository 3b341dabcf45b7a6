"""Describe the training run that a plan is made for."""

from dataclasses import dataclass

from minillm.config.model import ModelConfig
from minillm.errors import UsageError, parameter

WIDE = 4  # bytes of fp32: gradients, masters, moments


@dataclass(frozen=True)
class Job:
    """Training run to be planned.

    model: shape of the model
    ranks: number of ranks W
    batch_size: sequences per step over all ranks
    micro_batch: sequences that a rank computes at a time; None: all sequences of the rank
    width: bytes of the compute dtype
    optimizer: name of the optimizer, "adamw" or "muon"
    average: whether an average of the weights is kept (ema)
    offload: whether the optimizer state is kept in the host's memory
    again: whether activation checkpointing is on
    bucket_bytes: bytes of gradients that are communicated together
    Raises UsageError if the sequences cannot be divided evenly.
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
                f"{parameter('batch_size')} {self.batch_size} is not divisible by {self.ranks} "
                f"ranks; nearest: {max(1, round(self.batch_size / self.ranks)) * self.ranks}"
            )
        if self.share % (self.micro_batch or 1):
            raise UsageError(
                f"{parameter('micro_batch_size')} {self.micro_batch} does not divide the "
                f"{self.share} sequences of each of {self.ranks} ranks"
            )

    @property
    def share(self) -> int:
        """Return the number of sequences of a rank in a step."""
        return self.batch_size // self.ranks

    @property
    def micro_batches(self) -> int:
        """Return the number of micro-batches of a rank in a step."""
        return self.share // (self.micro_batch or self.share)

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all ranks in a step."""
        return self.batch_size * self.model.seq_len
