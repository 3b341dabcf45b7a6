"""A model on several ranks: who holds which weights, gradients and optimiser state.

    stage 0   every rank all of them; gradients are summed by DDP
    stage 1   optimiser state and fp32 masters in shards (zero.py)
    stage 2   gradients too
    stage 3   weights too, by FSDP2

Three classes with one face, which train.py works with. The model itself knows nothing of it.
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

BUFFERS = "broadcast_buffers"  # renamed by torch 2.13; ours are constants


class Replicated:
    """Stage 0, and one rank alone.

    forward: what a micro-batch is called with; before a backward pass only within `synced`.
    weight: by which losses are multiplied so that their gradients add up over the ranks.
    """

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
        """Around a micro-batch's forward and backward pass; after the last gradients are whole."""
        return nullcontext() if last or self.ranks.size == 1 else self.forward.no_sync()

    def squares(self) -> Tensor:
        """The sum of the squares of all gradients, () fp64, the same on all ranks."""
        return sum_of_squares([p.grad for p in self.parameters.values() if p.grad is not None])

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter, elements of its gradient): what this rank looks after; over the ranks, each
        element once.
        """
        mine = ((name, self.parameters[name].grad) for name in self.ranks.share_of(self.parameters))
        yield from ((name, gradient) for name, gradient in mine if gradient is not None)

    def step(self, grad_scale: Tensor | None) -> None:
        """Step all optimisers on the gradients times grad_scale, and drop them.

        Raises RuntimeError on several ranks if one has no gradient, which DDP does not allow.
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
        """Forget the gradients."""
        for p in self.parameters.values():
            p.grad = None

    def pieces(self) -> Iterator[Piece]:
        """What this rank has to save: here its share of what all have."""
        mine = self.ranks.share_of(self.parameters)
        yield from whole_pieces({name: self.parameters[name] for name in mine}, self.optimizers)

    def load(self, past: TensorSource) -> None:
        """Take all weights and states from a checkpoint."""
        load_weights(self.model, past.tensors("model"), past.folder)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        load_optimizer_tensors(self.optimizers, self.parameters, past.tensors("optimizer"))

    def bytes(self) -> dict[str, int]:
        """Bytes that this rank holds now: parameters, gradients, masters, moments, buffers."""
        return bytes_of(self.parameters, self.optimizers)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The model's methods other than forward work inside the `with`, on all ranks at once.

        At stage 3 only after a first forward and backward pass, in which FSDP2 finds its root.
        """
        yield


class Flat:
    """Stages 1 and 2: each optimiser a ZeroOptimizer."""

    def __init__(
        self, model: GPT, recipes: list[Recipe], ranks: Ranks, forward: Callable, **options
    ) -> None:
        """options: stage, dtype, offload of ZeroOptimizer."""
        self.model, self.ranks, self.forward, self.weight = model, ranks, forward, 1.0
        own = dict(model.named_parameters())
        self.optimizers = [
            ZeroOptimizer(
                {n: own[n] for g in r.groups for n in g["params"]}, r.groups, r.make, ranks,
                whole=r.whole, group=ranks.lane(i), **options,
            )
            for i, r in enumerate(recipes)
        ]  # fmt: skip

    @contextmanager
    def synced(self, last: bool) -> Iterator[None]:
        """As Replicated's."""
        with ExitStack() as stack:
            for optimizer in self.optimizers:
                stack.enter_context(optimizer.synced(last))
            yield

    def squares(self) -> Tensor:
        """As Replicated's; each rank adds those of its shards."""
        return self.ranks.sum(sum(optimizer.squares() for optimizer in self.optimizers))

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """As Replicated's: those of this rank's shards."""
        for optimizer in self.optimizers:
            yield from optimizer.gradients()

    def step(self, grad_scale: Tensor | None) -> None:
        """As Replicated's; then all ranks have the new weights."""
        for optimizer in self.optimizers:
            optimizer.step(grad_scale)

    def drop(self) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def pieces(self) -> Iterator[Piece]:
        """As Replicated's: this rank's shards."""
        for optimizer in self.optimizers:
            yield from optimizer.pieces()

    def load(self, past: TensorSource) -> None:
        """As Replicated's; each rank reads its shards."""
        past.check_fit("model", dict(self.model.named_parameters()))
        agree(self.ranks, lambda: self._read(past))  # before any rank waits for the others
        for optimizer in self.optimizers:
            optimizer.load(past.piece)

    def _read(self, past: TensorSource) -> None:
        """Read this rank's weights once, so that damage is met here."""
        for piece in self.pieces():
            past.piece("model", piece.name, piece.start, piece.stop)

    def bytes(self) -> dict[str, int]:
        """As Replicated's."""
        found = [optimizer.bytes() for optimizer in self.optimizers]
        return {kind: sum(each[kind] for each in found) for kind in found[0]}

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """As Replicated's."""
        yield


class Sharding(Protocol):
    """What Replicated, Flat and fsdp.Full have in common; Replicated says what each part means."""

    model: GPT
    ranks: Ranks
    forward: Callable
    weight: float
    optimizers: list
    synced: Callable[[bool], AbstractContextManager]
    squares: Callable[[], Tensor]
    gradients: Callable[[], Iterator[tuple[str, Tensor]]]
    step: Callable[[Tensor | None], None]
    drop: Callable[[], None]
    pieces: Callable[[], Iterator[Piece]]
    load: Callable[[TensorSource], None]
    bytes: Callable[[], dict[str, int]]
    gathered: Callable[[], AbstractContextManager]


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
    """The model on its ranks, at a stage; weights are kept in `dtype` where fp32 masters are.

    recipes: of the optimisers.    forward: the model, compiled.    One rank alone keeps all its
    weights, whatever the stage. Raises ValueError for stage 3 with matrices that are needed whole.
    """
    # No `or`: torch gives a compiled module a length, which it then fails to compute.
    forward = model if forward is None else forward
    if stage == 0 or (stage == 3 and ranks.size == 1):
        return Replicated(model, recipes, ranks, forward)
    if stage in (1, 2):
        narrow = dtype if dtype in (torch.bfloat16, torch.float16) else None
        return Flat(model, recipes, ranks, forward, stage=stage, dtype=narrow, offload=offload)
    if any(recipe.whole for recipe in recipes):
        raise ValueError("stage 3 cuts the matrices that one of the optimisers needs whole")
    from minillm.distributed.fsdp import (
        Full,  # FSDP takes a second to import, and only stage 3 needs it
    )

    return Full(model, recipes, ranks, forward, dtype)
