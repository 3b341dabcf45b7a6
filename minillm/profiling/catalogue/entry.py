"""Define the entry of the catalogue: sizes, data and costs of one operation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

FORWARD, BACKWARD = "forward", "backward"
# Forward and backward pass timed together. An operation that computes its gradients in the forward
# pass has no backward pass that could be timed alone.
BOTH = "forward+backward"

TOKENS, WIDTH = 16384, 2048  # tokens in a batch and model width, for sizes on a GPU

Sizes = dict[str, int]  # such as {"N": 16384, "C": 2048}, letters as in kernels/reference/
Draw = Callable[..., Tensor]  # draw(*shape, dtype="", scale=1.0, shift=0.0) -> random numbers


@dataclass
class Data:
    """Arguments of one call of an operation.

    leaves: tensors that need a gradient, by the names of the arguments
    others: all other arguments
    dy: the gradient of each output, where there are leaves
    part: cuts out of any tensor, argument, result or gradient, the part that is compared with fp64,
        where all of it would take too much memory; the part must not depend on the rest
    """

    leaves: dict[str, Any]
    others: dict[str, Any]
    dy: list[Tensor] = field(default_factory=list)
    part: Callable[[Tensor], Tensor] = lambda x: x


@dataclass(frozen=True)
class Entry:
    """Sizes, data and costs of one operation, by which the profiler measures it.

    gpu, cpu: sizes that are measured on a GPU and on a CPU
    small: sizes for Triton's interpreter. They are odd on purpose: nothing is timed there, and
        wrong masks show only where tiles do not fit
    data: data(sizes, draw, device) makes the arguments
    cost: cost(sizes, itemsize, direction) returns useful FLOPs and bytes that must move. FLOPs are
        those that the maths needs. Bytes are those of reading each large input and writing each
        large output once; an implementation that moves more is less efficient
    directions: directions that are timed separately
    dtype: dtype of the data, for an operation that is always called with the same one
    tile_sizes: tile_sizes(size, words) returns the sizes by which the entry `size` of a table of
        tiles is measured, or None if that entry is not tuned; `words` are those of the kernel's
        name in the table
    """

    gpu: list[Sizes]
    cpu: list[Sizes]
    small: Sizes
    data: Callable[[Sizes, Draw, Any], Data]
    cost: Callable[[Sizes, int, str], tuple[float, float]]
    directions: tuple[str, ...] = (FORWARD,)
    dtype: str | None = None
    tile_sizes: Callable[[int, set[str]], Sizes | None] = lambda size, words: None
