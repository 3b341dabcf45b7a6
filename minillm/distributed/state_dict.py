"""Load the tensors of a model and of its optimisers by name, and check them first."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minillm.errors import CorruptError


def load_optimizer_tensors(
    optimizers: list[Optimizer], parameters: dict[str, Tensor], tensors: dict[str, Tensor]
) -> None:
    """Put saved states into the optimisers of the parameters.

    optimizers: optimisers of the parameters
    parameters: parameters by name
    tensors: the states, named KIND.PARAMETER, such as "exp_avg.head.weight"

    Raises CorruptError if a state belongs to no parameter, or has another shape than its parameter.
    """
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
    """Copy tensors into the parameters of a model.

    model: model whose parameters are filled
    tensors: values by the name of the parameter
    source: the file or folder that errors name

    Raises CorruptError as load_into does.
    """
    load_into(dict(model.named_parameters()), tensors, source)


@torch.no_grad()
def load_into(own: dict[str, Tensor], tensors: dict[str, Tensor], source: Path) -> None:
    """Copy `tensors` into the tensors of the same names in `own`.

    own: tensors that are filled, by name
    tensors: values by name
    source: the file or folder that errors name

    Raises CorruptError if names or shapes differ, or if a value is not finite.
    """
    refuse_misfit(source, own, tensors)
    for name, mine in own.items():
        refuse_values(source, name, tensors[name])
        mine.copy_(tensors[name])


def refuse_misfit(source: Path, own: dict[str, Tensor], found: dict) -> None:
    """Raise CorruptError unless `found` has the names and shapes of `own`, in floating point.

    source: the file or folder that the error names
    own: tensors to load into, by name
    found: what was found, by name; each has a shape and a dtype
    """
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


def refuse_values(source: Path, name: str, values: Tensor) -> None:
    """Raise CorruptError unless all values are finite.

    source: the file or folder that the error names
    name: name of the tensor
    values: its elements, any shape, floating point
    """
    if not torch.isfinite(values).all():
        raise CorruptError(f"{source}: {name} holds values that are not finite")
