"""Stage 3: FSDP2 cuts the weights by rows over the ranks and gathers them where they are needed.

Source: Zhao et al. 2023, arXiv:2304.11277; torch.distributed.fsdp.fully_shard.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from minillm.distributed.agreement import agree
from minillm.distributed.pieces import Piece, TensorSource, bytes_of, whole_pieces
from minillm.distributed.ranks import Ranks
from minillm.model.gpt import GPT
from minillm.optim.clip import sum_of_squares
from minillm.optim.recipe import Recipe


class FullySharded:
    """Stage 3: FSDP2 cuts the weights by rows; the optimisers step this rank's rows."""

    def __init__(
        self, model: GPT, recipes: list[Recipe], ranks: Ranks, forward: Callable, dtype: torch.dtype
    ) -> None:
        self.model, self.ranks, self.forward = model, ranks, forward
        self.weight = float(ranks.size)
        narrow = dtype in (torch.bfloat16, torch.float16)
        policy = MixedPrecisionPolicy(
            param_dtype=dtype if narrow else None,
            reduce_dtype=torch.float32 if narrow else None,
            cast_forward_inputs=False,  # the tables of rotary embeddings stay fp32
        )
        mesh = init_device_mesh(ranks.device.type, (ranks.size,))
        prelude, core, coda = model.config.depths
        for i in (*range(prelude), *range(prelude + core, prelude + core + coda)):
            fully_shard(model.blocks[i], mesh=mesh, mp_policy=policy)
        self.core = list(model.blocks[prelude : prelude + core])
        if core:  # gathered once for all iterations of a micro-batch, forward and backward
            fully_shard(self.core, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
            self.core[0].set_reshard_after_backward(False)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        self.parameters = dict(model.named_parameters())
        self.locals = {n: nn.Parameter(p.to_local().detach()) for n, p in self.parameters.items()}
        self.optimizers = [recipe.build(self.locals) for recipe in recipes]

    @contextmanager
    def synced(self, last: bool) -> Iterator[None]:
        """Sum and cut the gradients after every micro-batch, because they may not fit whole."""
        self.model.set_is_last_backward(last)
        yield
        if self.core:
            self.core[0].reshard()

    def squares(self) -> Tensor:
        """Sum the squares of all ranks' rows."""
        found = [p.grad.to_local() for p in self.parameters.values() if p.grad is not None]
        return self.ranks.sum(sum_of_squares(found).to(self.ranks.device))

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the gradients of this rank's rows."""
        found = self.parameters.items()
        yield from ((name, p.grad.to_local()) for name, p in found if p.grad is not None)

    def step(self, grad_scale: Tensor | None) -> None:
        """Step this rank's rows."""
        for name, p in self.parameters.items():
            self.locals[name].grad = None if p.grad is None else p.grad.to_local()
        for optimizer in self.optimizers:
            optimizer.step(grad_scale=grad_scale)
        self.drop()

    def drop(self) -> None:
        """Drop the gradients."""
        for name, p in self.parameters.items():
            p.grad = self.locals[name].grad = None

    def pieces(self) -> Iterator[Piece]:
        """Yield this rank's rows."""
        for piece in whole_pieces(self.locals, self.optimizers):
            start = self._start(piece.name)
            yield replace(piece, start=start, stop=start + piece.stop)

    def load(self, past: TensorSource) -> None:
        """Read this rank's rows."""
        agree(self.ranks, lambda: self._read(past))

    @torch.no_grad()
    def _read(self, past: TensorSource) -> None:
        past.check_fit("model", dict(self.model.named_parameters()))
        owner = {p: o for o in self.optimizers for g in o.param_groups for p in g["params"]}
        kinds = {key.partition(".")[0] for key in past.names("optimizer")}
        for optimizer in self.optimizers:
            optimizer.state.clear()
        for name, p in self.locals.items():
            span = self._start(name), self._start(name) + p.numel()
            p.copy_(past.piece("model", name, *span).view_as(p))
            for kind in kinds:
                values = past.piece(kind, name, *span)
                if values is not None:
                    values = values.view_as(p).to(p.device) if values.dim() else values
                    owner[p].state[p][kind] = values

    def _start(self, name: str) -> int:
        """Return the element at which this rank's rows begin; FSDP2 cuts as torch.chunk does."""
        whole = self.parameters[name]
        rows = -(-whole.shape[0] // self.ranks.size)
        return min(self.ranks.rank * rows, whole.shape[0]) * (whole.numel() // whole.shape[0])

    def bytes(self) -> dict[str, int]:
        """Count this rank's rows, without the weights that FSDP2 gathers."""
        for name, p in self.parameters.items():
            self.locals[name].grad = None if p.grad is None else p.grad.to_local()
        return bytes_of(self.locals, self.optimizers)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather the weights of all ranks."""
        self.model.unshard()
        try:
            yield
        finally:
            self.model.reshard()
