"""Build the parts that a run trains with: device, dtype, model, micro-batch, optimizers, ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minillm.checkpoint import find
from minillm.config.train import ModelConfig, TrainConfig
from minillm.data.batches import Batches
from minillm.data.shards import Corpus
from minillm.distributed.agreement import agree
from minillm.distributed.ranks import Ranks
from minillm.distributed.strategies import Sharding, shard
from minillm.errors import UnavailableError, UsageError, parameter
from minillm.model.gpt import GPT
from minillm.model.size import n_parameters
from minillm.ops import EAGER, select
from minillm.optim.build import OPTIMIZERS, recipes
from minillm.planning import estimate
from minillm.runtime import device
from minillm.training.microbatch import largest_that_fits

HELD = ("parameters", "gradients", "masters", "moments")  # kinds of estimate.memory that stay
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that is decided before the first step and does not change afterwards.

    config: settings of the training
    corpus: prepared text
    batches: batches of the training split
    sharding: the model, its optimizers and how they are laid out over the ranks
    decided: choices that a resumed run keeps: threads, dtype, micro_batch_size, ranks
    micro_batch: sequences of a micro-batch on each rank
    threads_reason: why this number of threads was chosen
    asked_lengths: lengths (steps, epochs, time_limit) that a run is resumed with
    """

    config: TrainConfig
    corpus: Corpus
    batches: Batches
    sharding: Sharding
    decided: Mapping[str, int | str]
    micro_batch: int
    threads_reason: str = ""
    asked_lengths: frozenset[str] = frozenset()

    @property
    def model(self) -> GPT:
        """The decoder, on this rank."""
        return self.sharding.model

    @property
    def ranks(self) -> Ranks:
        """The ranks that train together."""
        return self.sharding.ranks

    @property
    def rows(self) -> int:
        """Sequences of a step on each rank."""
        return self.config.batch_size // self.ranks.size


def rows_of_a_rank(config: TrainConfig, size: int) -> int:
    """Return the number of sequences of a step on each of `size` ranks.

    config: settings of the training
    size: number of ranks

    Raises UsageError if the ranks, or the recurrence groups of a rank, do not divide the batch.
    """
    if config.batch_size % size:
        raise UsageError(
            f"{parameter('batch_size')} {config.batch_size} is not a multiple of {size} ranks; "
            f"nearest: {max(1, round(config.batch_size / size)) * size}"
        )
    rows = config.batch_size // size
    if rows % config.recurrence_groups:
        raise UsageError(
            f"{parameter('recurrence_groups')} {config.recurrence_groups} does not divide the "
            f"{rows} sequences of each of {size} ranks"
        )
    return rows


def require_memory(model: ModelConfig, config: TrainConfig, ranks: Ranks) -> None:
    """Raise UnavailableError if a rank's weights and optimizer alone cannot fit on its device.

    model: configuration of the model
    config: settings of the training
    ranks: ranks that train together
    """
    job = estimate.Job(model, ranks.size, config.batch_size, None, optimizer=config.optimizer)
    each = estimate.memory(job, config.zero)
    # Every rank builds the whole model before it is sharded.
    need = max(4 * n_parameters(model), sum(each[kind] for kind in HELD))
    free = _free_memory(ranks)
    if free is not None and need > free:
        raise UnavailableError(
            f"{n_parameters(model):,} parameters need {need / 2**30:,.1f} GiB to train and "
            f"{free / 2**30:,.1f} GiB are free; reduce {parameter('d_model')} or "
            f"{parameter('n_layer')}"
        )


def _free_memory(ranks: Ranks) -> int | None:
    """Return the bytes that this rank may take; the ranks of a machine share its CPU memory."""
    free = device.available_memory(ranks.device)
    shared = ranks.device.type == "cpu" and free is not None
    return free // ranks.world.local_size if shared else free


def set_threads(
    config: TrainConfig, saved: Mapping[str, Any], ranks: Ranks, *, given: bool
) -> tuple[int, str]:
    """Set the number of CPU threads; return it and the reason for it.

    config: settings of the training
    ranks: ranks that train together
    saved: decisions of the run that is resumed; empty for a new run
    given: whether the command line names a number
    """
    keep = saved.get("ranks", 1) == ranks.size and not given
    threads = saved["threads"] if saved and keep else config.threads
    return device.set_threads("1" if threads == "auto" and ranks.size > 1 else threads)


def _is_cut(config: TrainConfig, ranks: Ranks) -> bool:
    """Return whether no rank keeps the whole model, which may be too large for any device."""
    return config.zero == 3 and ranks.size > 1


def build_model(shape: ModelConfig, config: TrainConfig, dtype: torch.dtype, ranks: Ranks) -> GPT:
    """Return the model with its initial weights, which are a function of the seed alone.

    It is on the rank's device, or on the CPU if it is cut before it goes to the devices.

    shape: configuration of the model
    config: settings of the training
    dtype: compute dtype
    ranks: ranks that train together
    """
    ops = select(
        config.kernels, ranks.device,
        d_model=shape.d_model, d_head=shape.d_head, vocab_size=shape.vocab_size,
        dropout=shape.dropout,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(config.seed)
    model = GPT(shape, ops, dtype, generator)
    model = model.to("cpu" if _is_cut(config, ranks) else ranks.device).train()
    model.checkpointing = config.activation_checkpointing
    return model


def find_micro_batch(model: GPT, config: TrainConfig, rows: int, ranks: Ranks) -> int:
    """Return the sequences of a micro-batch: those that were asked for, or the most that fit.

    model: the decoder
    config: settings of the training
    ranks: ranks that train together
    rows: sequences of a step on this rank
    """
    found = config.micro_batch_size
    if found == "auto" and _is_cut(config, ranks) and ranks.device.type == "cuda":
        found = 1  # the whole model may not fit there, so nothing can be tried
    elif found == "auto":
        copies = OPTIMIZERS[config.optimizer].matrix_copies + 2 * bool(config.ema)
        copies /= ranks.size if config.zero else 1
        sharers = ranks.world.local_size
        fits = partial(largest_that_fits, model, rows, ranks.device, copies, sharers)
        found = agree(ranks, fits)
    return int(ranks.minimum(int(found)))


def load_initial_weights(model: GPT, source: str | Path, ranks: Ranks) -> None:
    """Load the weights of another run, its averaged ones if it has any. Every rank calls it.

    model: the decoder
    source: folder of the other run
    ranks: ranks that train together
    """
    find.while_there(source, "last", lambda past: past.load_into(model), ranks)


def build_sharding(model: GPT, config: TrainConfig, dtype: torch.dtype, ranks: Ranks) -> Sharding:
    """Return the model with its optimizers, compiled if asked for, laid out over the ranks.

    model: the decoder
    config: settings of the training
    dtype: compute dtype
    ranks: ranks that train together
    """
    wanted = recipes(
        config.optimizer, dict(model.named_parameters()), model.matrices(),
        EAGER if config.offload else model.ops, (config.beta1, config.beta2),
        config.weight_decay, dtype, model.undecayed(),
    )  # fmt: skip
    forward = model
    if config.compile:
        ranks.say("compile   the model, which can take minutes; the run begins after that")
        forward = compiled(model, whole=ranks.size == 1)
    return shard(
        model, wanted, ranks, config.zero, dtype=dtype, offload=config.offload, forward=forward
    )


def compiled(model: GPT, whole: bool) -> Callable:
    """Return the compiled model.

    model: the decoder
    whole: compile it as one. If its core is run repeatedly, or there are several ranks, it is
        compiled block by block, so that hooks and collectives stay outside.
    """
    if whole and model.config.recurrent is None:
        return torch.compile(model)
    model.compiled = [torch.compile(block) for block in model.blocks]
    return model
