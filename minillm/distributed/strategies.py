"""Strategies to lay out a model over the ranks, by the part of it that each rank holds.

    stage 0   DataParallel   holds all weights, gradients and states; DDP sums the gradients
    stage 1   ZeroSharded    shards the optimiser state and the fp32 masters (zero.py)
    stage 2   ZeroSharded    also shards the gradients
    stage 3   FullySharded   also shards the weights, by FSDP2 (fsdp.py)

Training uses all of them through the protocol Sharding. The model does not know that there are
ranks.

Source: Rajbhandari et al. 2020, arXiv:1910.02054, section 5.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from inspect import signature
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from minillm.distributed.agreement import agree
from minillm.distributed.pieces import Piece, TensorSource, bytes_of, whole_pieces
from minillm.distributed.ranks import Ranks
from minillm.distributed.state_dict import load_optimizer_tensors, load_weights
from minillm.distributed.zero import ZeroOptimizer
from minillm.model.gpt import GPT
from minillm.optim.clip import sum_of_squares
from minillm.optim.recipe import Recipe

BUFFERS = "broadcast_buffers"  # renamed in torch 2.13; the buffers of our models are constants


class Sharding(Protocol):
    """Interface of a sharded model and its optimisers.

    The docstrings of its methods say what every strategy does. Those of a strategy say only in
    which way it does it.

    model: the decoder on this rank
    forward: the callable that takes a micro-batch; before a backward pass it is called in `synced`
    weight: factor of the loss that makes the sum of the ranks' gradients the gradient of the batch
    optimizers: the optimisers; each has param_groups, as a torch optimiser has
    """

    model: GPT
    ranks: Ranks
    forward: Callable
    weight: float
    optimizers: list

    def synced(self, last: bool) -> AbstractContextManager[None]:
        """Return a context manager for the forward and the backward pass of a micro-batch.

        last: whether this is the last micro-batch of the step, after which the gradients are summed
            over the ranks
        """

    def squares(self) -> Tensor:
        """Return the sum of the squares of all gradients, () fp64, the same on all ranks."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter, elements of its gradient). Each element comes once over the ranks."""

    def step(self, grad_scale: Tensor | None) -> None:
        """Step all optimisers, and drop the gradients.

        grad_scale: () factor of all gradients; None: 1
        """

    def drop(self) -> None:
        """Drop the gradients of a step that is skipped."""

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces that this rank saves. Each element comes once over the ranks."""

    def load(self, past: TensorSource) -> None:
        """Load all weights and optimiser states from a checkpoint. Every rank calls it.

        Raises CorruptError, on all ranks, if they do not fit or are damaged.
        """

    def bytes(self) -> dict[str, int]:
        """Return the bytes on this rank of parameters, gradients, masters, moments and buffers."""

    def gathered(self) -> AbstractContextManager[None]:
        """Return a context manager in which all methods of the model work, on all ranks at once.

        Stage 3 needs a forward and a backward pass before it, in which FSDP2 finds its root.
        """


class DataParallel:
    """Stage 0, and a process that is the only rank: each rank holds everything."""

    def __init__(self, model: GPT, recipes: list[Recipe], ranks: Ranks, forward: Callable) -> None:
        self.model, self.ranks, self.forward = model, ranks, forward
        self.weight = float(ranks.size)
        self.parameters = dict(model.named_parameters())
        self.optimizers = [recipe.build(self.parameters) for recipe in recipes]
        if ranks.size > 1:
            known = signature(DistributedDataParallel).parameters
            still = "forward_sync_buffers" if "forward_sync_buffers" in known else BUFFERS
            self.forward = DistributedDataParallel(
                model, gradient_as_bucket_view=True, **{still: False}
            )

    def synced(self, last: bool) -> AbstractContextManager:
        """Let DDP sum the gradients in the last micro-batch only."""
        return nullcontext() if last or self.ranks.size == 1 else self.forward.no_sync()

    def squares(self) -> Tensor:
        """Sum the squares of this rank's gradients, which all ranks have."""
        return sum_of_squares([p.grad for p in self.parameters.values() if p.grad is not None])

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the gradients of this rank's share of the parameters."""
        mine = (
            (name, self.parameters[name].grad) for name in self.ranks.own_share(self.parameters)
        )
        yield from ((name, gradient) for name, gradient in mine if gradient is not None)

    def step(self, grad_scale: Tensor | None) -> None:
        """Step all optimisers, and drop the gradients.

        Raises RuntimeError on several ranks if a parameter has no gradient, which DDP needs.
        """
        missing = [n for n, p in self.parameters.items() if p.requires_grad and p.grad is None]
        if missing and self.ranks.size > 1:
            raise RuntimeError(
                f"{missing[0]} has no gradient, which stage 0 cannot have on several ranks; set "
                "requires_grad of it to False, or take stage 1 or 2"
            )
        for optimizer in self.optimizers:
            optimizer.step(grad_scale=grad_scale)
        self.drop()

    def drop(self) -> None:
        """Drop the gradients."""
        for p in self.parameters.values():
            p.grad = None

    def pieces(self) -> Iterator[Piece]:
        """Yield whole parameters: this rank's share of them."""
        mine = self.ranks.own_share(self.parameters)
        yield from whole_pieces({name: self.parameters[name] for name in mine}, self.optimizers)

    def load(self, past: TensorSource) -> None:
        """Read all tensors, on every rank."""
        load_weights(self.model, past.tensors("model"), past.folder)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        load_optimizer_tensors(self.optimizers, self.parameters, past.tensors("optimizer"))

    def bytes(self) -> dict[str, int]:
        """Count whole parameters, gradients and states."""
        return bytes_of(self.parameters, self.optimizers)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Do nothing: the weights are whole."""
        yield


class ZeroSharded:
    """Stages 1 and 2: each optimiser is a ZeroOptimizer."""

    def __init__(
        self, model: GPT, recipes: list[Recipe], ranks: Ranks, forward: Callable, **options
    ) -> None:
        """Build the optimisers.

        options: stage, dtype and offload of ZeroOptimizer
        """
        self.model, self.ranks, self.forward, self.weight = model, ranks, forward, 1.0
        own = dict(model.named_parameters())
        self.optimizers = [
            ZeroOptimizer(
                {n: own[n] for g in r.groups for n in g["params"]}, r.groups, r.make, ranks,
                whole=r.whole, group=ranks.optimizer_group(i), **options,
            )
            for i, r in enumerate(recipes)
        ]  # fmt: skip

    @contextmanager
    def synced(self, last: bool) -> Iterator[None]:
        """Let each optimiser collect the gradients and sum them as its stage says."""
        with ExitStack() as stack:
            for optimizer in self.optimizers:
                stack.enter_context(optimizer.synced(last))
            yield

    def squares(self) -> Tensor:
        """Sum the squares of all shards over the ranks."""
        return self.ranks.sum(sum(optimizer.squares() for optimizer in self.optimizers))

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the gradients of this rank's shards."""
        for optimizer in self.optimizers:
            yield from optimizer.gradients()

    def step(self, grad_scale: Tensor | None) -> None:
        """Step this rank's shards, and gather the new weights of all ranks."""
        for optimizer in self.optimizers:
            optimizer.step(grad_scale)

    def drop(self) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def pieces(self) -> Iterator[Piece]:
        """Yield this rank's shards."""
        for optimizer in self.optimizers:
            yield from optimizer.pieces()

    def load(self, past: TensorSource) -> None:
        """Read this rank's shards."""
        past.check_fit("model", dict(self.model.named_parameters()))
        agree(self.ranks, lambda: self._read(past))
        for optimizer in self.optimizers:
            optimizer.load(past.piece)

    def _read(self, past: TensorSource) -> None:
        """Read this rank's weights once, so that damage is found before any rank waits."""
        for piece in self.pieces():
            past.piece("model", piece.name, piece.start, piece.stop)

    def bytes(self) -> dict[str, int]:
        """Add up the bytes of the optimisers."""
        found = [optimizer.bytes() for optimizer in self.optimizers]
        return {kind: sum(each[kind] for each in found) for kind in found[0]}

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Do nothing: the weights are whole."""
        yield


def shard(
    model: GPT,
    recipes: list[Recipe],
    ranks: Ranks,
    stage: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    forward: Callable | None = None,
) -> Sharding:
    """Return a model and its optimisers, sharded over the ranks. One rank alone keeps all weights.

    model: the model on this rank, whole
    recipes: optimisers that have no parameters yet
    ranks: ranks that it is sharded over
    stage: 0 to 3, see the head of this file
    dtype: dtype of the computation, in which stages 1 and 2 store weights next to fp32 masters
    offload: keep the optimiser state of stages 1 and 2 in host memory
    forward: the compiled model; None: the model itself

    Raises ValueError for stage 3 with an optimiser that needs whole matrices.
    """
    # No `or`: torch gives a compiled module a length, which it then fails to compute.
    forward = model if forward is None else forward
    if stage == 0 or (stage == 3 and ranks.size == 1):
        return DataParallel(model, recipes, ranks, forward)
    if stage in (1, 2):
        narrow = dtype if dtype in (torch.bfloat16, torch.float16) else None
        return ZeroSharded(
            model, recipes, ranks, forward, stage=stage, dtype=narrow, offload=offload
        )
    if any(recipe.whole for recipe in recipes):
        raise ValueError(
            "stage 3 cuts matrices that one of the optimisers needs whole; take stage 2"
        )
    # FSDP takes a second to import, and only stage 3 needs it.
    from minillm.distributed.fsdp import FullySharded

    return FullySharded(model, recipes, ranks, forward, dtype)
