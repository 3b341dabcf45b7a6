"""The state of optimisers as named tensors, as a checkpoint holds them."""

import torch
from torch import Tensor
from torch.optim import Optimizer


def optimizer_tensors(optimizers: list[Optimizer], names: dict[Tensor, str]) -> dict[str, Tensor]:
    """Return every tensor of the optimisers' states, named KIND.PARAMETER."""
    return {
        f"{kind}.{names[p]}": value if torch.is_tensor(value) else torch.tensor(value)
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for kind, value in state.items()
    }
