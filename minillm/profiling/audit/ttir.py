"""Read the products and bytes that a kernel asks for, loop by loop, from Triton's code.

Machine code does not show everything: the size of a tcgen05 product, for example, is in a register.
Also, its counts are per thread. Triton's code shows the work of a whole program in one pass of a
loop.
"""

import re
from dataclasses import dataclass, field

WIDTH = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "f16": 2, "bf16": 2, "i16": 2, "i8": 1, "i1": 1}
HALVES = {"bf16", "f16"}

_SHAPE = r"<((?:\d+x)+)([a-z]+\d+)"
_DOT = re.compile(rf"tensor{_SHAPE}[^*]*\*\s*tensor{_SHAPE}")
_MMA = re.compile(rf"!ttg\.memdesc{_SHAPE}, ([^>]*)>")
_ACCESS = re.compile(r"tensor<((?:\d+x)*)!tt\.ptr<([a-z]+\d+)>|: !tt\.ptr<([a-z]+\d+)>")
_PLAIN = re.compile(r"\btt\.dot .*-> tensor<[^#>]*#blocked")
_WARPS = re.compile(r'"ttg\.total-num-warps" = (\d+)')
_TILE = re.compile(rf"tensordesc<tensor{_SHAPE}")


@dataclass(frozen=True)
class Dot:
    """One product of (m, k) by (k, n) of a program, and its bytes in shared memory."""

    m: int
    n: int
    k: int
    dtype: str
    shared_bytes: int = 0

    @property
    def flops(self) -> int:
        """Additions and multiplications, with the padding of the tile."""
        return 2 * self.m * self.n * self.k


@dataclass
class Region:
    """Body of one loop without its inner loops, or (depth 0) the code outside of all loops.

    loads: numbers in the tile, and bytes of one number, of each load through pointers
    tiles: the same of each load through a descriptor (TMA)
    """

    depth: int
    dots: list[Dot] = field(default_factory=list)
    loads: list[tuple[int, int]] = field(default_factory=list)
    tiles: list[tuple[int, int]] = field(default_factory=list)
    stored_bytes: int = 0

    @property
    def flops(self) -> int:
        """FLOPs of all products of one program in one pass."""
        return sum(dot.flops for dot in self.dots)

    @property
    def loaded_bytes(self) -> int:
        """Bytes that one program loads in one pass."""
        return sum(n * width for n, width in self.loads) + self.tma_bytes

    @property
    def tma_bytes(self) -> int:
        """Loaded bytes that TMA writes to shared memory."""
        return sum(n * width for n, width in self.tiles)


def _sizes(text: str) -> list[int]:
    return [int(n) for n in text.split("x") if n]


def _product(sizes: list[int]) -> int:
    total = 1
    for n in sizes:
        total *= n
    return total


def _read(line: str, region: Region) -> None:
    """Add one line of TTIR or TTGIR to its region."""
    if " tt.dot " in line and (m := _DOT.search(line)):
        a, b = _sizes(m[1]), _sizes(m[3])
        region.dots.append(Dot(a[-2], b[-1], a[-1], m[2]))
    elif "tc_gen5_mma" in line and len(m := _MMA.findall(line)) >= 2:
        a, b = _sizes(m[0][0]), _sizes(m[1][0])
        held = [_product(s) for s, where in ((a, m[0][2]), (b, m[1][2])) if "#smem" in where]
        region.dots.append(Dot(a[-2], b[-1], a[-1], m[0][1], sum(held) * WIDTH.get(m[0][1], 1)))
    elif "tt.descriptor_load" in line and (m := _TILE.search(line)):
        region.tiles.append((_product(_sizes(m[1])), WIDTH[m[2]]))
    elif ("tt.load" in line or "tt.store" in line) and (m := _ACCESS.search(line)):
        tile = _product(_sizes(m[1] or "")), WIDTH.get(m[2] or m[3], 1)
        if "tt.load" in line:
            region.loads.append(tile)
        else:
            region.stored_bytes += tile[0] * tile[1]


def regions(text: str) -> list[Region]:
    """Return the body of the function and then of each loop, of TTIR or TTGIR (tcgen05 only)."""
    found = [Region(0)]
    stack = [(0, found[0])]
    depth = 0
    for line in text.splitlines():
        opens = line.count("{") - line.count("}")
        if opens > 0 and re.search(r"\bscf\.(for|while)\b", line):
            found.append(Region(len(stack)))
            stack.append((depth, found[-1]))
        depth += opens
        while len(stack) > 1 and depth <= stack[-1][0]:
            stack.pop()
        _read(line, stack[-1][1])
    return found


def hot(text: str) -> Region:
    """Return the loop with most FLOPs in products, else with most bytes, else the function."""

    def weight(r: Region) -> tuple:
        moved = r.loaded_bytes + r.stored_bytes
        return r.depth > 0 and r.flops, r.flops, r.depth > 0 and moved, moved

    return max(regions(text), key=weight)


def products(text: str) -> set[str]:
    """Return the dtypes of the operands of matrix products."""
    return {dot.dtype for r in regions(text) for dot in r.dots}


def plain_products(text: str) -> int:
    """Count the products of TTGIR that run on the fp32 units."""
    return sum(bool(_PLAIN.search(line)) for line in text.splitlines())


def wide_loads(text: str, threads: int) -> int:
    """Return the number of 16-byte loads of one thread for tiles of 16 bytes a thread or more.

    If a condition has branches, the branch with the most loads counts.

    text: code of the kernel in TTIR
    threads: number of threads in a CTA
    """
    blocks = [[0]]  # for each open block, the count of each of its branches
    for line in text.splitlines():
        opens = line.count("{") - line.count("}")
        if opens > 0:
            blocks.append([0])
        elif opens < 0 and len(blocks) > 1:
            most = max(blocks.pop())
            blocks[-1][-1] += most
        elif "} else {" in line:
            blocks[-1].append(0)
        one = Region(0)
        _read(line, one)
        blocks[-1][-1] += sum(n * width // (16 * threads) for n, width in one.loads)
    return sum(max(block) for block in blocks)


def warps(text: str, asked: int) -> int:
    """Return the number of warps of a program, including those that Triton adds.

    text: code of the kernel in TTGIR
    asked: number of warps in the launch, returned if the code states none
    """
    m = _WARPS.search(text)
    return int(m[1]) if m else asked
