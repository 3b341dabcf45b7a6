"""The dtype in which the reference computes."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Return x in fp32, or in fp64 if it is fp64 already."""
    return x if x.dtype == torch.float64 else x.float()
