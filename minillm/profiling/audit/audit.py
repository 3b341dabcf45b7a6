"""Static audit: compile every launch of a list of cases, measure its machine code and judge it."""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch
from triton import knobs

from minillm.profiling.audit import sass, ttir
from minillm.profiling.audit.bound import Bound, bound
from minillm.profiling.audit.cases import STREAMING, Case
from minillm.profiling.audit.dry import Build, dry_gpu
from minillm.profiling.audit.occupancy import ARCHS, ctas_per_sm, occupancy

Row = dict[str, object]
Say = Callable[[str], None]
# Shared memory for tiles of a table that other GPUs use too: sm_86, sm_89 and sm_120 take those of
# sm_80 and give a CTA 99 KiB (CUDA C++ Programming Guide, "Compute Capabilities").
SMALLEST = {80: 99 * 1024}


def audit(cases: Sequence[Case], workers: int = 2, say: Say | None = None) -> list[Row]:
    """Return the rows of all cases, one for each compiled kernel, sorted by kernel, arch, config.

    Everything is compiled, because Triton's cache is set to a new folder.

    A row has plain values under these keys:
        kernel, op, config, arch
        registers of a thread, spill_bytes (of the stack), shared_bytes of a CTA
        tensor_core: name of the instruction, "" if there is none
        occupancy: share of the warps that a multiprocessor can hold, 0 to 1; ctas_per_sm
        bound_tflops, bound_split_tflops, bound_sum_tflops, bound_gbps, limit (the slowest unit),
            clocks_<unit> and <unit>_per_flop: see bound.Bound
        num_warps, num_stages, serialised, loads_128, loads_narrow, loads_tma, atomics
        wants_tensor_core, wants_exact (fp32 products must stay fp32), wants_loads_128
        plain_products: number of products that no tensor core computes
        streams: whether its data come from memory and not from L2
        compile_s: seconds
        error: "" if it compiled; otherwise the reason, and most other values are None

    cases: see cases.subset and cases.full
    workers: number of processes that share the cases (0: run them in this process)
    say: called with each line of progress

    Raises RuntimeError if TRITON_INTERPRET is set and there are no workers.
    """
    if workers == 0 and knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles nothing")
    with _own_settings():
        if workers == 0:
            return merged(row for case in cases for row in audit_case(case))
        return merged(_in_processes(cases, workers, say or (lambda line: None)))


@contextmanager
def _own_settings() -> Iterator[None]:
    """Give Triton an empty cache and no interpreter, here and in processes started meanwhile."""
    with knobs.runtime.scope(), knobs.cache.scope(), tempfile.TemporaryDirectory() as folder:
        knobs.runtime.interpret = False
        knobs.cache.dir = folder
        yield


def _in_processes(cases: Sequence[Case], workers: int, say: Say) -> Iterator[Row]:
    """Yield the rows of all cases; a case that kills its process counts as not compiling."""
    context = multiprocessing.get_context("spawn")

    def pool(size: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(size, context, torch.set_num_threads, (1,))

    lost = []
    with pool(workers) as some:
        tasks = {some.submit(audit_case, case): case for case in cases}
        for n, task in enumerate(as_completed(tasks), 1):
            case = tasks[task]
            say(f"{n}/{len(tasks)} sm_{case.arch} {case.op} {case.label}")
            try:
                yield from task.result()
            except BrokenProcessPool:  # a compiler that aborts also ends all cases that wait
                lost.append(case)
    for case in lost:
        say(f"alone: sm_{case.arch} {case.op} {case.label}")
        with pool(1) as alone:
            try:
                yield from alone.submit(audit_case, case).result()
            except BrokenProcessPool:
                yield _failure(case, case.op, "the compiler ended its process")


def audit_case(case: Case) -> list[Row]:
    """Return the rows of one case: one for each kernel it launches, or one with the error."""
    problem = ""
    with dry_gpu(case.arch) as builds:
        try:
            case.run()
        except Exception as e:  # the error of the compiler or the operation is the result
            problem = f"{type(e).__name__}: {e}"
    different = {b.kernel.hash if b.kernel else b.name: b for b in builds}
    rows = merged(_row(build, case) for build in different.values())
    if problem and not any(row["error"] for row in rows):
        rows.append(_failure(case, case.op, problem))
    return rows


def merged(rows: Iterable[Row]) -> list[Row]:
    """Return the rows in order, with each compiled kernel once."""
    ordered = sorted(rows, key=lambda r: (r["kernel"], _number(r["arch"]), r["config"]))
    seen: dict[object, Row] = {}
    for row in ordered:
        seen.setdefault((row["kernel"], row["arch"], row["hash"] or row["config"]), row)
    return list(seen.values())


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def _failure(case: Case, kernel: str, error: str) -> Row:
    names = (
        "registers spill_bytes shared_bytes tensor_core occupancy ctas_per_sm bound_tflops "
        "bound_split_tflops bound_sum_tflops bound_gbps limit num_warps num_stages serialised "
        "loads_128 loads_narrow loads_tma atomics wants_tensor_core plain_products wants_exact "
        "wants_loads_128 streams hash compile_s"
    ).split()
    row = {"kernel": kernel, "op": case.op, "config": case.label, "arch": f"sm_{case.arch}"}
    # A message of the compiler begins with the place and ends with the error, after the source.
    lines = [line for line in error.splitlines() if line.strip()] or ["unknown"]
    brief = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
    return {**row, **dict.fromkeys(names), "error": brief[:300]}


def _config(build: Build, case: Case) -> str:
    """Return case, tile and switches in a line, such as "bf16 128 window; M128 N64 w8 s3; tma"."""
    tile, switches = [], []
    for name, value in sorted(build.constants.items()):
        if "BLOCK" in name:
            tile.append(f"{name.replace('BLOCK_', '')}{value}")
        elif value is True or isinstance(value, str):
            switches.append(value if isinstance(value, str) else name.lower())
    options = build.kernel.metadata
    tile += [f"w{options.num_warps}", f"s{options.num_stages}"]
    op = "" if case.op in build.name else f"{case.op} "
    return f"{op}{case.label}; {' '.join(tile)}" + ("; " + " ".join(switches)) * bool(switches)


def _row(build: Build, case: Case) -> Row:
    """Return the measurements of one launch."""
    if build.kernel is None:
        return _failure(case, build.name, build.error)
    arch, options, asm = ARCHS[case.arch], build.kernel.metadata, build.kernel.asm
    registers, stack = sass.resources(asm["cubin"])
    code = sass.parse(sass.disassemble(asm["cubin"]))
    wide, narrow, tiles = sass.loads(code)
    warps, held = options.num_warps, ttir.warps(asm["ttgir"], options.num_warps)
    columns = getattr(options, "tmem_size", None) or 0
    ctas = ctas_per_sm(arch, registers, held, options.shared, columns)
    products = ttir.products(asm["ttir"])
    streams = not products or build.name.startswith(STREAMING)
    exact = case.dtype == "fp32"
    limit = bound(
        arch, sass.hot(code), ttir.hot(asm["ttir"]), ttir.hot(asm["ttgir"]), warps, streams
    )
    return {
        "kernel": build.name,
        "op": case.op,
        "config": _config(build, case),
        "arch": arch.name,
        "registers": registers,
        "spill_bytes": stack,
        "shared_bytes": options.shared,
        "tensor_core": sass.tensor_core(code),
        "occupancy": occupancy(arch, ctas, held),
        "ctas_per_sm": ctas,
        **_bounds(limit),
        "num_warps": warps,
        "num_stages": options.num_stages,
        "serialised": sass.serialised(code, asm["ttgir"].count("warp_group_dot_wait")),
        "loads_128": wide,
        "loads_narrow": narrow,
        "loads_tma": tiles,
        "atomics": sass.atomics(code),
        **{f"clocks_{unit}": clocks for unit, clocks in limit.clocks.items()},
        **{f"{unit}_per_flop": n for unit, n in limit.per_flop.items()},
        "wants_tensor_core": bool(products & ttir.HALVES or products and not exact),
        "plain_products": ttir.plain_products(asm["ttgir"]),
        "wants_exact": exact and bool(products),
        "wants_loads_128": ttir.wide_loads(asm["ttir"], 32 * warps),
        "streams": streams,
        "compile_s": round(build.seconds, 2),
        "hash": options.hash,
        "error": "",
    }


def _bounds(limit: Bound) -> Row:
    """Return the bounds of a row."""
    return {
        "bound_tflops": round(limit.tflops_max, 2),
        "bound_split_tflops": round(limit.tflops_split, 2),
        "bound_sum_tflops": round(limit.tflops_sum, 2),
        "bound_gbps": round(limit.gbps, 1),
        "limit": limit.unit,
    }


def faults(row: Row) -> list[str]:
    """Return what is wrong with a row, in words; an empty list for a kernel that may ship."""
    if row["error"]:
        return [f"does not compile: {row['error']}"]
    found = []
    arch = _number(row["arch"])
    allowed = min(ARCHS[arch].shared_bytes_cta, SMALLEST.get(arch, 1 << 20))
    if row["shared_bytes"] > allowed:
        found.append(f"{row['shared_bytes']} bytes of shared memory, {allowed} allowed")
    elif row["ctas_per_sm"] == 0:
        found.append("no CTA fits on a multiprocessor")
    if row["spill_bytes"]:
        found.append(f"{row['spill_bytes']} bytes of registers spilled")
    if row["serialised"]:
        found.append("wgmma serialised")
    if row["wants_tensor_core"] and (not row["tensor_core"] or row["plain_products"]):
        found.append("a 16-bit product without tensor core")
    if row["wants_exact"] and row["tensor_core"]:
        found.append("an fp32 product rounded for the tensor core")
    if row["loads_128"] < row["wants_loads_128"]:
        found.append(f"{row['loads_128']} loads of 128 bits, {row['wants_loads_128']} expected")
    if row["atomics"]:
        found.append(f"{row['atomics']} atomic instructions")
    return found


def summary(rows: Sequence[Row]) -> str:
    """Return a Markdown table with one line for each kernel and architecture: builds and ranges."""
    lines = [
        "| kernel | arch | builds | faults | registers | spill | shared KiB | serialised "
        "| tensor core | occupancy | bound |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], _number(row["arch"])), []).append(row)
    for (kernel, arch), group in sorted(groups.items()):
        built = [r for r in group if not r["error"]]
        if not built:
            lines.append(f"| {kernel} | sm_{arch} | {len(group)} | {len(group)} |")
            continue
        unit, key = ("GB/s", "bound_gbps") if built[0]["streams"] else ("TFLOP/s", "bound_tflops")
        cells = [
            kernel, f"sm_{arch}", len(group), sum(bool(faults(r)) for r in group),
            _range(r["registers"] for r in built), max(r["spill_bytes"] for r in built),
            _range(r["shared_bytes"] // 1024 for r in built), sum(r["serialised"] for r in built),
            " ".join(sorted({r["tensor_core"] for r in built} - {""})) or "-",
            _range(round(100 * r["occupancy"]) for r in built) + " %",
            f"{_range(round(r[key]) for r in built)} {unit}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _range(numbers: Iterable[int]) -> str:
    """Return the range of numbers, as "3" or "3-7"."""
    ordered = sorted(numbers)
    return "-".join(map(str, dict.fromkeys((ordered[0], ordered[-1]))))


def markdown(rows: Sequence[Row]) -> str:
    """Return a Markdown table with one line for each build, products in TFLOP/s, others in GB/s."""
    lines = [
        "| kernel | config | arch | registers | spill | shared KiB | CTAs/SM | occupancy "
        "| tensor core | bound | limit |",
        "|---|---|---|--:|--:|--:|--:|--:|---|--:|---|",
    ]
    for r in rows:
        if r["error"]:
            error = r["error"].replace("|", "/")
            lines.append(f"| {r['kernel']} | {r['config']} | {r['arch']} | {error} |")
            continue
        speed = (
            f"{r['bound_gbps']:.0f} GB/s" if r["streams"] else f"{r['bound_tflops']:.0f} TFLOP/s"
        )
        cells = [
            r["kernel"], r["config"], r["arch"], r["registers"], r["spill_bytes"],
            f"{r['shared_bytes'] / 1024:.0f}", r["ctas_per_sm"], f"{100 * r['occupancy']:.0f} %",
            r["tensor_core"] or "-", speed, r["limit"],
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"
