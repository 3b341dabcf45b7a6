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
from dataclasses import replace
from inspect import signature

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from minillm.checkpoint import Checkpoint
from minillm.model import GPT
from minillm.optim import Recipe, squares
from minillm.pieces import Piece
from minillm.ranks import Ranks
from minillm.statetensors import load_optimizer_tensors, load_weights
from minillm.zero import ZeroOptimizer

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
        return squares([p.grad for p in self.parameters.values() if p.grad is not None])

    def step(self, grad_scale: Tensor | None) -> None:
        """Step all optimisers on the gradients times grad_scale, and drop them."""
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
        yield from pieces_of({name: self.parameters[name] for name in mine}, self.optimizers)

    def load(self, past: Checkpoint) -> None:
        """Take all weights and states from a checkpoint."""
        load_weights(self.model, past.tensors("model"), past.folder)
        load_optimizer_tensors(self.optimizers, self.parameters, past.tensors("optimizer"))

    def bytes(self) -> dict[str, int]:
        """Bytes that this rank holds now: parameters, gradients, masters, moments, buffers."""
        return bytes_of(self.parameters, self.optimizers)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The model's methods other than forward work inside the `with`, on all ranks at once."""
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
                whole=r.whole, **options,
            )
            for r in recipes
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

    def load(self, past: Checkpoint) -> None:
        """As Replicated's; each rank reads its shards."""
        past.check_fit("model", dict(self.model.named_parameters()))
        for optimizer in self.optimizers:
            optimizer.load(past.piece)

    def bytes(self) -> dict[str, int]:
        """As Replicated's."""
        found = [optimizer.bytes() for optimizer in self.optimizers]
        return {kind: sum(each[kind] for each in found) for kind in found[0]}

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """As Replicated's."""
        yield


class Full:
    """Stage 3: weights cut by rows, gathered where they are needed. AdamW steps local shards."""

    def __init__(
        self, model: GPT, recipes: list[Recipe], ranks: Ranks, forward: Callable, dtype: torch.dtype
    ) -> None:
        self.model, self.ranks, self.forward = model, ranks, forward
        self.weight = float(ranks.size)
        narrow = dtype in (torch.bfloat16, torch.float16)
        policy = MixedPrecisionPolicy(
            param_dtype=dtype if narrow else None,
            reduce_dtype=torch.float32 if narrow else None,
            cast_forward_inputs=False,  # tables of rotations stay fp32
        )
        mesh = init_device_mesh(ranks.device.type, (ranks.size,))
        prelude, core, coda = model.config.depths
        for i in (*range(prelude), *range(prelude + core, prelude + core + coda)):
            fully_shard(model.blocks[i], mesh=mesh, mp_policy=policy)
        if core:  # gathered once for all its iterations
            blocks = list(model.blocks[prelude : prelude + core])
            fully_shard(blocks, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        self.parameters = dict(model.named_parameters())
        self.locals = {n: nn.Parameter(p.to_local().detach()) for n, p in self.parameters.items()}
        self.optimizers = [recipe.build(self.locals) for recipe in recipes]

    @contextmanager
    def synced(self, last: bool) -> Iterator[None]:
        """As Replicated's. Gradients are cut after every micro-batch: whole they do not fit."""
        self.model.set_is_last_backward(last)
        yield

    def squares(self) -> Tensor:
        """As Replicated's; each rank adds those of its rows."""
        found = [p.grad.to_local() for p in self.parameters.values() if p.grad is not None]
        return self.ranks.sum(squares(found))

    def step(self, grad_scale: Tensor | None) -> None:
        """As Replicated's."""
        for name, p in self.parameters.items():
            self.locals[name].grad = None if p.grad is None else p.grad.to_local()
        for optimizer in self.optimizers:
            optimizer.step(grad_scale=grad_scale)
        self.drop()

    def drop(self) -> None:
        """Forget the gradients."""
        for name, p in self.parameters.items():
            p.grad = self.locals[name].grad = None

    def pieces(self) -> Iterator[Piece]:
        """As Replicated's: this rank's rows."""
        for piece in pieces_of(self.locals, self.optimizers):
            start = self._start(piece.name)
            yield replace(piece, start=start, stop=start + piece.stop)

    @torch.no_grad()
    def load(self, past: Checkpoint) -> None:
        """As Replicated's; each rank reads its rows."""
        past.check_fit("model", dict(self.model.named_parameters()))
        owner = {p: o for o in self.optimizers for g in o.param_groups for p in g["params"]}
        kinds = {key.partition(".")[0] for key in past.names("optimizer")}
        for name, p in self.locals.items():
            span = self._start(name), self._start(name) + p.numel()
            p.copy_(past.piece("model", name, *span).view_as(p))
            for kind in kinds:
                values = past.piece(kind, name, *span)
                if values is not None:
                    values = values.view_as(p).to(p.device) if values.dim() else values
                    owner[p].state[p][kind] = values

    def _start(self, name: str) -> int:
        """The element of a parameter at which this rank's rows begin; FSDP2 cuts as torch.chunk."""
        whole = self.parameters[name]
        rows = -(-whole.shape[0] // self.ranks.size)
        return min(self.ranks.rank * rows, whole.shape[0]) * (whole.numel() // whole.shape[0])

    def bytes(self) -> dict[str, int]:
        """As Replicated's; what FSDP2 gathers is not seen."""
        for name, p in self.parameters.items():
            self.locals[name].grad = None if p.grad is None else p.grad.to_local()
        return bytes_of(self.locals, self.optimizers)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """As Replicated's."""
        self.model.unshard()
        try:
            yield
        finally:
            self.model.reshard()


def pieces_of(
    parameters: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]
) -> Iterator[Piece]:
    """Whole parameters and their optimisers' states."""
    states = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    for name, p in parameters.items():
        state = {
            kind: value.reshape(-1) if value.dim() else value
            for kind, value in states.get(p, {}).items()
        }
        yield Piece(name, 0, p.numel(), p.detach().reshape(-1), state)


def bytes_of(
    parameters: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]
) -> dict[str, int]:
    """Bytes of parameters, gradients and the optimisers' states, which are their own masters."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return {
        "parameters": sum(p.nbytes for p in parameters.values()),
        "gradients": sum(p.grad.nbytes for p in parameters.values() if p.grad is not None),
        "masters": 0,
        "moments": sum(x.nbytes for state in states for x in state.values() if torch.is_tensor(x)),
        "buffers": 0,
    }


Sharding = Replicated | Flat | Full


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
    forward = forward or model
    if stage == 0 or (stage == 3 and ranks.size == 1):
        return Replicated(model, recipes, ranks, forward)
    if stage in (1, 2):
        narrow = dtype if dtype in (torch.bfloat16, torch.float16) else None
        return Flat(model, recipes, ranks, forward, stage=stage, dtype=narrow, offload=offload)
    if any(recipe.whole for recipe in recipes):
        raise ValueError("stage 3 cuts the matrices that one of the optimisers needs whole")
    return Full(model, recipes, ranks, forward, dtype)
