"""Read the machine code (SASS) of a kernel: its resources, its loops, and its hot loop.

The disassembler and the resource reader come with Triton. Neither needs a GPU.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field

from triton import knobs

_LABEL = re.compile(r"\s*(\.L_\w+):")
_LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
_TARGET = re.compile(r"(\.L_\w+)")
_LOAD = re.compile(r"LDG(STS)?$")
_MMA = ("HGMMA", "HMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA", "IMMA")
# A block with one of these does work, so it is not a mask path that a tile in the middle skips.
_WORK = (*_MMA, "SYNCS", "BAR", "UTMALDG", "LDGSTS", "LDTM", "STTM", "UTCBAR")
_MEMORY = ("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "UTMASTG")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its predicate ("" if it always runs), full opcode and operands."""

    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Code:
    """Instructions of a kernel without its subroutines, and the targets of labels."""

    instructions: list[Instruction]
    labels: dict[str, int]


@dataclass(frozen=True)
class Stretch:
    """Counts of one thread in the hot loop, or in the whole kernel if it has no loop.

    counts: instructions by name, without the mask path
    skipped: instructions of the mask path by name
    mma_flops: FLOPs of one warp's HMMA, or one warpgroup's HGMMA, in a pass; 0 if the code does not
        show them
    mma_shared: bytes of shared memory that one warpgroup's HGMMA read
    shared_bytes, global_bytes: bytes that other instructions of one warp move
    """

    is_loop: bool
    counts: Counter = field(default_factory=Counter)
    skipped: Counter = field(default_factory=Counter)
    mma_flops: int = 0
    mma_shared: int = 0
    shared_bytes: int = 0
    global_bytes: int = 0


def _tool(tool: str, cubin: bytes, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, tool).path, *flags, file.name]
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout


def disassemble(cubin: bytes) -> str:
    """Return the SASS of a cubin as text."""
    return _tool("nvdisasm", cubin, "-c")


def resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread, and its bytes of stack, which hold spilled registers."""
    m = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", cubin, "-res-usage"))
    return int(m[1]), int(m[2])


def parse(text: str) -> Code:
    """Parse the disassembler's text up to the first subroutine (slow division, traps)."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if line.startswith("$__internal"):
            break
        if m := _LABEL.match(line):
            labels[m[1]] = len(instructions)
        elif m := _LINE.match(line):
            instructions.append(Instruction((m[1] or "").strip(), m[2], m[3]))
    return Code(instructions, labels)


def loops(code: Code) -> list[tuple[int, int]]:
    """Return the first and last instruction of each loop, outer loops first.

    A jump back from beyond the end of the kernel is no loop, because such code only waits for a
    barrier. Neither is one instruction that jumps to itself.
    """
    found: dict[int, int] = {}
    ends = [i for i, x in enumerate(code.instructions) if x.name == "EXIT" and not x.predicate]
    for i, x in enumerate(code.instructions):
        if x.name == "BRA" and (m := _TARGET.search(x.operands)):
            start = code.labels.get(m[1], i + 1)
            if start < i and not any(start <= e <= i for e in ends):
                found[start] = max(i, found.get(start, 0))
    return sorted(found.items(), key=lambda s: (s[0], -s[1]))


def _hot_span(code: Code) -> tuple[int, int, bool]:
    """Return the innermost loop with most products, else most global memory, else everything."""

    def weight(span: tuple[int, int]) -> tuple[int, int]:
        inside = code.instructions[span[0] : span[1] + 1]
        products = sum(x.name in _MMA for x in inside)
        return products, sum(_bytes_of(x) for x in inside)

    spans = {span: weight(span) for span in loops(code)}
    for part in (0, 1):
        rank = {span: w[part] for span, w in spans.items() if w[part]}
        inner = [s for s in rank if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in rank)]
        if inner:
            start, end = min(inner, key=lambda s: (-rank[s], s[1] - s[0]))
            return start, end, True
        if part == 0 and any(x.name in _MMA for x in code.instructions):
            break
    ends = [i for i, x in enumerate(code.instructions) if x.name == "EXIT" and not x.predicate]
    return 0, max(ends, default=len(code.instructions) - 1), False


def _mask_path(code: Code, start: int, end: int, work: tuple[str, ...]) -> set[int]:
    """Return the instructions in blocks that a condition skips and that do none of the work."""
    rare: set[int] = set()
    for i in range(start, end):
        x = code.instructions[i]
        conditional = x.predicate or "P" in x.operands.split(",")[0].split("`")[0]
        if x.name != "BRA" or not conditional or not (m := _TARGET.search(x.operands)):
            continue
        target = code.labels.get(m[1], -1)
        block = code.instructions[i + 1 : target]
        if i < target <= end and not any(b.name in work for b in block):
            rare.update(range(i + 1, target))
    return rare


def _width(x: Instruction) -> int:
    """Return the bytes that a thread moves with a load or a store."""
    words = x.opcode.split(".")
    for word, size in {"256": 32, "ENL2": 32, "128": 16, "64": 8, "U16": 2, "S16": 2}.items():
        if word in words:
            return size
    return 1 if {"U8", "S8"} & set(words) else 4


def _bytes_of(x: Instruction) -> int:
    """Return the bytes of global memory that a warp moves with x."""
    return 32 * _width(x) if x.name in ("LDG", "STG", "LDGSTS") else 0


def _shared_bytes(x: Instruction) -> int:
    """Return the bytes of shared memory that a warp moves with x, without products."""
    if x.name in ("LDS", "STS", "LDGSTS"):
        return 32 * _width(x)
    if x.name in ("LDSM", "STSM"):
        m = re.search(r"\.([124])\b", x.opcode.replace(".16.", ".", 1))
        return 128 * int(m[1] if m else 1)
    return 0


def _product(x: Instruction) -> tuple[int, int]:
    """Return the FLOPs of a product of a warp or warpgroup, and its bytes from shared memory."""
    if m := re.match(r"[HQ]GMMA\.(\d+)x(\d+)x(\d+)", x.opcode):
        rows, columns, depth = map(int, m.groups())
        from_registers = re.match(r"R\d+,\s*R\d+", x.operands)
        # A row of either operand is 32 bytes deep in every dtype.
        return 2 * rows * columns * depth, 32 * (columns + (0 if from_registers else rows))
    if m := re.match(r"HMMA\.(16)(8)(\d+)", x.opcode):
        return 2 * 16 * 8 * int(m[3]), 0
    return 0, 0


def hot(code: Code) -> Stretch:
    """Count the stretch of code in which the kernel spends its time."""
    start, end, is_loop = _hot_span(code)
    inside = code.instructions[start : end + 1]
    has_product = any(x.name in _MMA for x in inside)
    rare = _mask_path(code, start, end, _WORK if has_product else _WORK + _MEMORY)
    counts, skipped = Counter(), Counter()
    flops = mma_shared = shared = moved = 0
    for i, x in enumerate(inside, start):
        (skipped if i in rare else counts)[x.name] += 1
        if i not in rare:
            product, read = _product(x)
            flops, mma_shared = flops + product, mma_shared + read
            shared, moved = shared + _shared_bytes(x), moved + _bytes_of(x)
    return Stretch(is_loop, counts, skipped, flops, mma_shared, shared, moved)


def tensor_core(code: Code) -> str:
    """Return the tensor-core instructions of the kernel; "" if it has none."""
    names = {x.name for x in code.instructions}
    return next((name for name in _MMA if name in names), "")


def serialised(code: Code, waits: int = 0) -> bool:
    """Return whether the assembler made wgmma synchronous, so that each product waits for the last.

    code: instructions of the kernel
    waits: number of waits in the source. Products of one instruction each may need that many
    """
    products = sum(x.name == "HGMMA" for x in code.instructions)
    seen = sum(x.opcode.startswith("WARPGROUP.DEPBAR") for x in code.instructions)
    return products > 1 and seen >= products and seen > waits


def loads(code: Code) -> tuple[int, int, int]:
    """Count loads from global memory: 128-bit ones (a 256-bit one is two), narrower ones, TMA."""
    wide = narrow = tiles = 0
    for x in code.instructions:
        if x.name == "UTMALDG":
            tiles += 1
        elif _LOAD.match(x.name) and _width(x) >= 16:
            wide += _width(x) // 16
        elif _LOAD.match(x.name):
            narrow += 1
    return wide, narrow, tiles


def atomics(code: Code) -> int:
    """Count atomic instructions on global memory; those on shared memory allocate tensor memory."""
    names = ("ATOM", "ATOMG", "RED", "REDG", "UTMAREDG", "UTMAREDP")
    return sum(x.name in names for x in code.instructions)
