"""Launch kernels and choose their tiles. Every launch goes through this file.

The tiles are in tiles/*.json, one file for each operation, one table for each architecture. `python
-m minillm profile --tune` measures candidates on a GPU and rewrites the table of its architecture.
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

from minillm.kernels._interpreter import repair

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # every kernel takes these
TILES = Path(__file__).resolve().parent / "tiles"


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Launch kernel[grid](*args, **options) on the device of the first argument.

    An empty grid launches nothing. Under TRITON_INTERPRET=1 the repaired interpreter runs the
    kernel on the CPU.

    kernel: compiled or interpreted Triton function
    grid: number of programs in each dimension
    *args: arguments by position, the first a tensor or a descriptor of one
    **options: constexpr arguments and launch options, such as num_warps
    """
    if 0 in grid:
        return
    first = args[0] if isinstance(args[0], Tensor) else args[0].base
    if isinstance(kernel, InterpretedFunction):
        repair()
        with np.errstate(all="ignore"):  # no warnings of infinities, as on a GPU
            kernel[grid](*args, **options)
    elif first.is_cuda:
        with torch.cuda.device(first.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on the CPU, uncompiled."""
    return knobs.runtime.interpret


def arch() -> int:
    """Return the architecture whose tiles the current GPU takes: 80, 90 or 100; interpreted 90.

    sm_80 stands for every GPU without wgmma or tcgen05 instructions: Ampere, Ada and sm_120.
    """
    if interpreted():
        return 90
    capability = driver.active.get_current_target().arch
    return {9: 90, 10: 100}.get(capability // 10, 80)


def has_tma() -> bool:
    """Return whether the GPU has a tensor memory accelerator, which loads tiles by descriptor."""
    return arch() >= 90


def tile(operation: str, kernel: str, size: int, variant: str = "") -> dict[str, int]:
    """Return the tile of a kernel: constexpr block sizes, num_warps and num_stages.

    operation: name of the file in tiles/
    kernel: name of the table in it
    size: the table's key, such as a head width or a row width; the smallest key that is not below
        it is taken
    variant: "" or the name of a second table of the kernel, such as "fp32"

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
