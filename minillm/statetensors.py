"""The tensors of a model and its optimisers by name: taken out, put back, refused if they misfit.

What this room does not do: files (checkpoint.py).
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minillm.errors import CorruptError, DivergedError
from minillm.tensorfiles import Stored, key_of


def optimizer_tensors(optimizers: list[Optimizer], names: dict[Tensor, str]) -> dict[str, Tensor]:
    """Every tensor of the optimisers' states, named KIND.PARAMETER."""
    return {
        f"{kind}.{names[p]}": value if torch.is_tensor(value) else torch.tensor(value)
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for kind, value in state.items()
    }


def sharded_tensors(
    pieces: Iterable[Any], shapes: dict[str, tuple[int, ...]]
) -> dict[str, dict[str, Tensor]]:
    """What checkpoint.save wants of a rank that keeps pieces of parameters: "model", "optimizer".

    pieces: of elements [p.start, p.stop) of parameter p.name, row by row: p.master, their values,
    and p.state, kind -> their state: (stop - start,), or () for one number for all of them.
    shapes: of the whole parameters.
    """
    model, optimizer = {}, {}
    for p in pieces:
        whole = p.stop - p.start == math.prod(shapes[p.name])
        key, shape = (p.name, shapes[p.name]) if whole else (key_of(p.name, p.start, p.stop), (-1,))
        model[key] = p.master.view(shape)
        for kind, value in p.state.items():
            if value.dim():
                optimizer[f"{kind}.{key}"] = value.view(shape)
            else:
                optimizer[f"{kind}.{p.name}"] = value
    return {"model": model, "optimizer": optimizer}


def load_optimizer_tensors(
    optimizers: list[Optimizer], parameters: dict[str, Tensor], tensors: dict[str, Tensor]
) -> None:
    """Give each parameter's optimiser the state that optimizer_tensors took from it."""
    owner = {
        p: optimizer for optimizer in optimizers for g in optimizer.param_groups
        for p in g["params"]
    }  # fmt: skip
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if name not in parameters:
            raise CorruptError(f"optimizer state of {name}, which the model does not have")
        p = parameters[name]
        if value.dim() and value.shape != p.shape:
            raise CorruptError(
                f"optimizer state {key} is {list(value.shape)}, expected {list(p.shape)}"
            )
        # Counts of steps stay on the CPU, where reading one waits for nothing.
        owner[p].state[p][kind] = value.to(p.device) if value.dim() else value


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy `tensors` into the model; raises as load_into does."""
    load_into(dict(model.named_parameters()), tensors, source)


@torch.no_grad()
def load_into(own: dict[str, Tensor], tensors: dict[str, Tensor], source: Path) -> None:
    """Copy `tensors` into those of the same names.

    Raises CorruptError if names or shapes are not the same or a value is not finite.
    """
    refuse_misfit(source, own, tensors)
    for name, mine in own.items():
        refuse_values(source, name, tensors[name])
        mine.copy_(tensors[name])


def refuse_misfit(source: Path, own: dict[str, Tensor], found: dict) -> None:
    """Raise CorruptError unless `found` has what `own` has: names, shapes, numbers with a point."""
    missing, extra = sorted(own.keys() - found), sorted(found.keys() - own.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which is unknown"
        raise CorruptError(f"{source}: does not fit the run's configuration: {what}")
    for name, mine in own.items():
        t = found[name]
        if t.shape != mine.shape or not t.dtype.is_floating_point:
            raise CorruptError(
                f"{source}: {name} is {t.dtype} {list(t.shape)}, expected {list(mine.shape)}"
            )


def refuse_states(
    source: Path,
    found: dict[str, Stored],
    kinds: dict[str, frozenset[str]],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Raise CorruptError unless the optimiser states `found`, KIND.PARAMETER, are what they must.

    source: the file that should have what is missing.    kinds: parameter -> its states, all of
    which must be there; none at all is the state before the first step.    shapes: of the
    parameters; a state has that of its own, "step" is one number.
    """
    expected = {f"{kind}.{name}" for name, own in kinds.items() for kind in own}
    missing, extra = sorted(expected - found.keys()), sorted(found.keys() - expected)
    if extra:
        path = found[extra[0]].parts[0].path
        raise CorruptError(f"{path}: holds {extra[0]}, which the run's optimiser does not know")
    if found and missing:
        raise CorruptError(f"{source}: lacks {missing[0]}, which the run's optimiser keeps")
    for key, t in found.items():
        kind, _, name = key.partition(".")
        shape = () if kind == "step" else shapes[name]
        if t.shape != shape or not t.dtype.is_floating_point:
            raise CorruptError(
                f"{t.parts[0].path}: {key} is {t.dtype} {list(t.shape)}, expected {list(shape)}"
            )


def refuse_values(source: Path, name: str, values: Tensor) -> None:
    """Raise CorruptError unless every weight is finite."""
    if not torch.isfinite(values).all():
        raise CorruptError(f"{source}: {name} holds values that are not finite")


def require_finite(kind: str, named: dict[str, Tensor]) -> None:
    """Raise DivergedError, naming the tensor, unless every value is finite."""
    for name, t in named.items():
        # The sum is finite only if all of them are, and nine times cheaper than looking at each;
        # a sum may also be too large where none of them is.
        if not torch.isfinite(t.detach().sum()) and not torch.isfinite(t.detach()).all():
            raise DivergedError(f"{name} of the {kind} is not finite; no checkpoint is written")
