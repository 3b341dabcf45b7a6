"""How a kernel is launched, and with which tile: the one door between the kernels and Triton.

The tiles stand in tiles/*.json, one file an operation, one table an architecture; `python -m
minillm profile --tune` measures candidates on a GPU and rewrites that GPU's table.
"""

import functools
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from minillm.kernels._interpreter import cure

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what every kernel takes
TILES = Path(__file__).resolve().parent / "tiles"


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """kernel[grid](*args, **options) on the first argument's device; an empty grid does nothing.

    Under TRITON_INTERPRET=1 the kernel is interpreted on the CPU, by an interpreter that is right.
    """
    if 0 in grid:
        return
    first = args[0] if isinstance(args[0], Tensor) else args[0].base
    if isinstance(kernel, InterpretedFunction):
        cure()
        with np.errstate(all="ignore"):  # a GPU does not warn of infinities either
            kernel[grid](*args, **options)
    elif first.is_cuda:
        with torch.cuda.device(first.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU, instead of being compiled."""
    return knobs.runtime.interpret


def arch() -> int:
    """Which table of tiles serves the current GPU: 80, 90 or 100; the interpreter takes 90.

    sm_80 stands for every GPU without wgmma or tcgen05 instructions: Ampere, Ada and sm_120.
    """
    if interpreted():
        return 90
    capability = driver.active.get_current_target().arch
    return {9: 90, 10: 100}.get(capability // 10, 80)


def has_tma() -> bool:
    """Whether tiles can come through the tensor memory accelerator (descriptors)."""
    return arch() >= 90


def tile(operation: str, kernel: str, size: int, variant: str = "") -> dict[str, int]:
    """The constexpr block sizes, num_warps and num_stages of a kernel for a problem of `size`.

    operation: the file of tiles/.    kernel: its entry there.    size: what the table is sorted
    by (head width, row width); the row of the smallest size that holds it is taken.
    variant: "" or the name of a second table, as "fp32".
    Raises ValueError if the table ends below `size`.
    """
    name = f"{kernel} {variant}" if variant else kernel
    rows = _tables(operation)[name][f"sm_{arch()}"]
    fits = [int(s) for s in rows if int(s) >= size]
    if not fits:
        raise ValueError(f"{operation}: size {size} is above {max(map(int, rows))}, the largest")
    return dict(rows[str(min(fits))])


@functools.cache
def _tables(operation: str) -> dict:
    return json.loads((TILES / f"{operation}.json").read_text(encoding="utf-8"))
