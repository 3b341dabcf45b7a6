"""Bounds on the speed of a kernel, from the machine code of its hot loop and published rates.

The rates and their sources are in occupancy.py.

Each unit of a multiprocessor needs some number of clocks for one pass of one CTA through the loop:

    max    the slowest unit alone, as if all overlapped perfectly
    split  products, then everything else
    sum    all units one after the other

Latency, barriers and bank conflicts are not counted. No kernel is faster than `max`, most are
slower, and the bounds are good for putting configurations in order.
"""

import re
from dataclasses import dataclass

from minillm.profiling.audit.occupancy import Arch
from minillm.profiling.audit.sass import Stretch
from minillm.profiling.audit.ttir import Region

# Unit -> the instructions it executes, by name without modifiers.
UNITS = {
    "mufu": r"MUFU",
    "fp32": r"FADD|FMUL|FFMA|FADD2|FMUL2|FFMA2|FSWZADD",
    "alu": r"FMNMX3?|FSEL|SEL|[IF]SETP|LOP3|PRMT|SHF|IADD3?|VIADD|VIADDMNMX|V?IMNMX3?|LEA|PLOP3|MOV"
    r"|F2FP?|I2FP?|F2I|I2F|HADD2|HMUL2|HFMA2|CS2R|P2R|R2P|SGXT|BMSK|IABS|POPC|FLO|I2IP|FCHK",
    "imad": r"IMAD",
    "lanes": r"SHFL|C?REDUX|MOVM|LDSM?|STSM?|LDG|STG|LDGSTS|LDL|STL|LD|ST|ATOM\w*|REDG?",
}
PACKED = ("FADD2", "FMUL2", "FFMA2", "FMNMX3")  # two results for each thread
FLOPS = {"FADD": 1, "FMUL": 1, "FFMA": 2, "FADD2": 2, "FMUL2": 2, "FFMA2": 4, "MUFU": 1}
# Rates of tensor cores for operands of these dtypes, as a multiple of the rate for bf16.
SPEED = {"f32": 0.5, "f8E4M3FN": 2.0, "f8E5M2": 2.0, "i8": 2.0}


@dataclass(frozen=True)
class Bound:
    """Costs of one pass of a CTA through the hot loop, and the resulting speeds of the whole GPU.

    clocks: clocks that each unit needs
    flops: useful FLOPs in the pass
    moved: bytes of global memory that the pass moves
    unit: the slowest unit
    tflops_max, tflops_split, tflops_sum: TFLOP/s, see the head of this file
    gbps: GB/s under `max`
    per_flop: thread instructions of a unit for one useful FLOP. Under "tensor" it is FLOPs
        executed, under "shared" and "global" bytes
    """

    clocks: dict[str, float]
    flops: float
    moved: float
    unit: str
    tflops_max: float
    tflops_split: float
    tflops_sum: float
    gbps: float
    per_flop: dict[str, float]


def thread_instructions(loop: Stretch, unit: str) -> int:
    """Return the number of instructions of a thread for a unit in one pass; a packed one counts 2.

    loop: the hot loop in machine code
    unit: a key of UNITS
    """
    pattern = re.compile(UNITS[unit])
    return sum(
        n * (2 if name in PACKED else 1)
        for name, n in loop.counts.items()
        if pattern.fullmatch(name)
    )


def _tensor_flops(loop: Stretch, source: Region, warps: int) -> float:
    """Return the FLOPs of the tensor cores for a CTA in a pass, with padding and repetition."""
    if loop.mma_flops:
        return loop.mma_flops * (warps / 4 if "HGMMA" in loop.counts else warps)
    return source.flops if any("MMA" in name for name in loop.counts) else 0


def _shared(loop: Stretch, source: Region, layout: Region, warps: int) -> float:
    """Return the bytes of shared memory of a CTA in a pass: operands, exchange, arriving tiles."""
    moved = loop.mma_shared * warps / 4 + loop.shared_bytes * warps
    if layout.flops and any(name.startswith("UTC") for name in loop.counts):
        share = sum(dot.shared_bytes for dot in layout.dots) / layout.flops
        moved += share * source.flops
    return moved + (source.tma_bytes if "UTMALDG" in loop.counts else 0)


def clocks(
    arch: Arch, loop: Stretch, source: Region, layout: Region, warps: int, streams: bool
) -> dict[str, float]:
    """Return the clocks that each unit of a multiprocessor needs for one pass of one CTA.

    arch: architecture of the GPU
    loop: the hot loop in machine code
    source, layout: the hot loop in TTIR and in TTGIR
    warps: number of warps of the CTA
    streams: whether its data come from memory, and not from L2, where other CTAs have left them
    """
    speed = SPEED.get(source.dots[0].dtype, 1.0) if source.dots else 1.0
    needed = {
        "tensor": _tensor_flops(loop, source, warps) / arch.tensor_flops / speed,
        "shared": _shared(loop, source, layout, warps) / arch.shared_rate,
    }
    for unit in UNITS:
        needed[unit] = thread_instructions(loop, unit) * 32 * warps / getattr(arch, unit)
    needed["issue"] = loop.counts.total() * warps / arch.issue
    moved = _moved(loop, source, warps)
    needed["l2"] = 0.0 if streams else moved / arch.l2_rate
    needed["memory"] = moved / arch.memory_rate if streams else 0.0
    return needed


def _moved(loop: Stretch, source: Region, warps: int) -> float:
    """Return the bytes of global memory of a CTA in a pass, by the source if it has products."""
    if source.flops or "UTMALDG" in loop.counts:
        return source.loaded_bytes + source.stored_bytes
    return loop.global_bytes * warps


def bound(
    arch: Arch, loop: Stretch, source: Region, layout: Region, warps: int, streams: bool
) -> Bound:
    """Return the static bound on the speed of a kernel.

    Useful FLOPs are those of the products in the source or, if it has none, those that the fp32 and
    special-function units execute.

    arch, loop, source, layout, warps, streams: see `clocks`
    """
    needed = clocks(arch, loop, source, layout, warps, streams)
    flops = source.flops or 32 * warps * sum(n * FLOPS.get(x, 0) for x, n in loop.counts.items())
    moved = _moved(loop, source, warps)
    products = max(needed["tensor"], needed["shared"])
    rest = [needed[unit] for unit in UNITS]
    # Copies from memory are asynchronous: they may be the limit, but they delay no other unit.
    copies = needed["l2"] + needed["memory"]
    turns = {
        "max": max(needed.values()),
        "split": max(copies, products + max(*rest, needed["issue"])),
        "sum": max(copies, products + max(sum(rest), needed["issue"])),
    }
    chip = arch.chip_hz / 1e12
    rates = {k: flops * chip / v if v else 0.0 for k, v in turns.items()}
    spent = {u: thread_instructions(loop, u) * 32 * warps for u in UNITS}
    spent["tensor"] = _tensor_flops(loop, source, warps)
    spent["shared"] = _shared(loop, source, layout, warps)
    spent["global"] = moved
    return Bound(
        clocks={k: round(v, 1) for k, v in needed.items()},
        flops=flops,
        moved=moved,
        unit=max(needed, key=needed.__getitem__),
        tflops_max=rates["max"],
        tflops_split=rates["split"],
        tflops_sum=rates["sum"],
        gbps=moved * arch.chip_hz / 1e9 / turns["max"] if turns["max"] else 0.0,
        per_flop={k: float(f"{v / flops:.3g}") if flops else 0.0 for k, v in spent.items()},
    )
