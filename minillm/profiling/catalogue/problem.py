"""The catalogue itself, and problems: one operation at one size in one dtype."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.profiling.catalogue import attention, loss, mlp, norms, optim, rope, sampling
from minillm.profiling.catalogue.entry import Data, Entry, Sizes
from minillm.runtime.device import DTYPES

CATALOGUE: dict[str, Entry] = {
    "attention": attention.ATTENTION,
    "decode_attention": attention.DECODE_ATTENTION,
    "rms_norm": norms.RMS_NORM,
    "add_rms_norm": norms.ADD_RMS_NORM,
    "sandwich_norm": norms.SANDWICH_NORM,
    "rope": rope.ROPE,
    "swiglu": mlp.SWIGLU,
    "adamw": optim.ADAMW,
    "linear_cross_entropy": loss.LINEAR_CROSS_ENTROPY,
    "newton_schulz": optim.NEWTON_SCHULZ,
    "sample": sampling.SAMPLE,
}


@dataclass(frozen=True)
class Problem:
    """One operation at one size: op "rms_norm", sizes {"N": 16384, "C": 2048}, dtype "bf16"."""

    op: str
    sizes: Sizes
    dtype: str

    @property
    def shape(self) -> str:
        """The sizes in words, such as "N16384 C2048"."""
        return " ".join(f"{letter}{size}" for letter, size in self.sizes.items())

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions that are timed, each by itself."""
        return CATALOGUE[self.op].directions

    def cost(self, direction: str) -> tuple[float, float]:
        """Return useful FLOPs, and bytes that must move."""
        return CATALOGUE[self.op].cost(self.sizes, DTYPES[self.dtype].itemsize, direction)

    def data(self, device: torch.device, seed: int = 0) -> Data:
        """Return random data, the same for each seed on one kind of device.

        device: device of the data
        seed: seed of the random numbers
        """
        numbers = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, dtype: str = "", scale: float = 1.0, shift: float = 0.0) -> Tensor:
            x = torch.randn(shape, generator=numbers, device=device) * scale + shift
            return x.to(DTYPES[dtype or self.dtype])

        return CATALOGUE[self.op].data(self.sizes, draw, device)


def problem_at(op: str, sizes: Sizes, dtype: str) -> Problem:
    """Return a problem with the given sizes.

    op: name of the operation
    sizes: number for each letter of its shapes
    dtype: dtype of the data; ignored if the operation is always called with another one
    """
    return Problem(op, sizes, CATALOGUE[op].dtype or dtype)


def problems_of(ops: tuple[str, ...], kind: str, dtype: str, quick: bool = False) -> list[Problem]:
    """Return the problems of some operations.

    ops: names of the operations
    kind: "cuda" or "cpu"
    dtype: dtype of the data, for operations that leave a choice
    quick: return one problem for each operation, on a CPU one an eighth as large
    """
    found = []
    for op in ops:
        sizes = CATALOGUE[op].gpu if kind == "cuda" else CATALOGUE[op].cpu
        if quick:
            sizes = [sizes[len(sizes) // 2]] if kind == "cuda" else [_smaller(sizes[0])]
        found += [problem_at(op, size, dtype) for size in sizes]
    return found


def small_problem(op: str, dtype: str) -> Problem:
    """Return a problem that the interpreter solves in about a second.

    op: name of the operation
    dtype: dtype of the data, if the operation leaves a choice
    """
    return problem_at(op, CATALOGUE[op].small, dtype)


def _smaller(size: Sizes) -> Sizes:
    longest = max(size, key=lambda letter: size[letter] if letter in "BTSNLMV" else 0)
    return {**size, longest: max(1, size[longest] // 8)}
