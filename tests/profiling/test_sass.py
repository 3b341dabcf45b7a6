"""Foundations of the audit: reading machine code and Triton's code, occupancy and bound by hand."""

import pytest

from minillm.profiling.audit import sass, ttir
from minillm.profiling.audit.bound import bound
from minillm.profiling.audit.occupancy import ARCHS, ctas_per_sm, occupancy


def code(*lines: str) -> sass.Code:
    """Machine code as the disassembler prints it; a line that ends in a colon is a label."""
    text = [
        line if line.endswith(":") else f"        /*{16 * i:04x}*/         {line} ;"
        for i, line in enumerate(lines)
    ]
    return sass.parse("\n".join(text))


HGMMA = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24"
FROM_REGISTERS = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"

LOOP = [
    "S2R R0, SR_TID.X",
    ".L_x_1:",
    HGMMA,
    FROM_REGISTERS,
    "MUFU.EX2 R5, R5",
    "@P0 BRA `(.L_x_2)",
    "FSEL R5, R5, -INF, P1",
    "ISETP.GE.AND P1, PT, R2, R3, PT",
    ".L_x_2:",
    "FFMA R6, R6, R5, R7",
    "STS.128 [R3], R4",
    "@!P2 BRA `(.L_x_1)",
    "EXIT",
    ".L_x_3:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2",
    "BRA `(.L_x_2)",
]


def test_the_loop_is_found_and_the_mask_path_set_apart():
    """Also: code moved behind the end, which jumps back into the loop, makes no loop."""
    parsed = code(*LOOP)
    assert sass.loops(parsed) == [(1, 9)]
    loop = sass.hot(parsed)
    assert loop.is_loop
    assert loop.counts["HGMMA"] == 2 and loop.counts["MUFU"] == 1 and loop.counts["FFMA"] == 1
    assert loop.skipped == {"FSEL": 1, "ISETP": 1}
    assert loop.mma_flops == 2 * 64 * 16 * (128 + 64)
    assert loop.mma_shared == 32 * (128 + 64) + 32 * 64  # the second has A in registers
    assert loop.shared_bytes == 32 * 16


def test_the_loop_with_most_products_counts():
    def loop(label: str, products: int) -> list[str]:
        return [f".L_x_{label}:", *["HMMA.16816.F32.BF16 R4, R8, R2, R4"] * products,
                f"@P0 BRA `(.L_x_{label})"]  # fmt: skip

    outer = [".L_x_9:", *loop("1", 2), *loop("2", 6), "LDG.E.128 R4, [R2]", "@P1 BRA `(.L_x_9)"]
    found = sass.hot(code(*outer, "EXIT"))
    assert found.counts == {"HMMA": 6, "BRA": 1} and found.mma_flops == 6 * 2 * 16 * 8 * 16


def test_without_a_loop_the_whole_kernel_counts_but_no_subroutine():
    text = ["LDG.E.128 R4, [R2.64]", "FADD R4, R4, R5", "STG.E.64 [R2.64], R4", "EXIT", "NOP"]
    parsed = code(*text, "$__internal_0_$__cuda_sm3x_div_rn:", "FFMA R1, R1, R1, R1")
    found = sass.hot(parsed)
    assert not found.is_loop and "FFMA" not in found.counts and "NOP" not in found.counts
    assert found.global_bytes == 32 * (16 + 8)


def test_serialised_products_are_seen():
    free = [HGMMA] * 8 + [WAIT]
    bound_ = [HGMMA, WAIT] * 8
    assert not sass.serialised(code(*free))
    assert sass.serialised(code(*bound_))
    assert sass.serialised(code(*[HGMMA, WAIT] * 2), waits=1)
    # Two products of one instruction each, and the source waits for both.
    assert not sass.serialised(code(*[HGMMA, WAIT] * 2), waits=2)
    assert not sass.serialised(code(HGMMA, WAIT))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("LDG.E.128 R4, desc[UR4][R2.64]", (1, 0, 0)),
        ("LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64]", (2, 0, 0)),
        ("LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]", (1, 0, 0)),
        ("UTMALDG.3D [UR8], [UR4]", (0, 0, 1)),
        ("LDG.E.U16 R4, desc[UR4][R2.64]", (0, 1, 0)),
        ("@P0 LDG.E.64 R4, desc[UR4][R2.64]", (0, 1, 0)),
        ("LDS.128 R4, [R2]", (0, 0, 0)),
    ],
)
def test_loads(line, expected):
    assert sass.loads(code(line)) == expected


def test_atomics_are_those_of_global_memory():
    lines = ["RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2], R4", "ATOMG.E.ADD PT, R4, [R2], R5"]
    assert sass.atomics(code(*lines)) == 2
    assert sass.atomics(code("ATOMS.OR RZ, [UR5+0x14], R3", "REDUX.SUM UR4, R3")) == 0


def test_tensor_core():
    assert sass.tensor_core(code(HGMMA)) == "HGMMA"
    assert sass.tensor_core(code("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]")) == "UTCHMMA"
    assert sass.tensor_core(code("FFMA R1, R1, R1, R1")) == ""


SOURCE = """
  tt.func public @_f(%Q: !tt.ptr<bf16>) {
    %q = tt.load %p, %m : tensor<128x64x!tt.ptr<bf16>> loc(#loc1)
    %r = scf.for %n = %1 to %2 step %c64_i32 iter_args(%a = %0) -> (tensor<128x64xf32>)  : i32 {
      %k = tt.descriptor_load %K[%b, %n] : !tt.tensordesc<tensor<1x32x64xbf16>> -> y
      %s = tt.dot %q, %k, %c, inputPrecision = tf32 : tensor<128x64xbf16> * tensor<64x32xbf16> -> x
      %l = tt.load %z : !tt.ptr<f32> loc(#loc)
      %t = scf.if %14 -> (tensor<128x32xf32>) {
        scf.yield %u : tensor<128x32xf32> loc(#loc)
      } else {
        scf.yield %s : tensor<128x32xf32> loc(#loc)
      } loc(#loc)
      tt.store %y, %t : tensor<128x32x!tt.ptr<f32>> loc(#loc)
    } loc(#loc)
    tt.store %o, %r : tensor<128x64x!tt.ptr<bf16>> loc(#loc)
  } loc(#loc)
"""


def test_the_source_says_what_a_program_does():
    body, loop = ttir.regions(SOURCE)
    assert body.loads == [(128 * 64, 2)] and body.stored_bytes == 128 * 64 * 2
    assert loop.flops == 2 * 128 * 32 * 64 and loop.depth == 1
    assert loop.loads == [(1, 4)] and loop.tiles == [(32 * 64, 2)]
    assert loop.tma_bytes == 32 * 64 * 2 and loop.loaded_bytes == loop.tma_bytes + 4
    assert loop.stored_bytes == 128 * 32 * 4
    assert ttir.hot(SOURCE).flops == loop.flops
    assert ttir.products(SOURCE) == {"bf16"} and not ttir.products("")


def test_loads_of_128_bits_are_wanted_where_the_tile_allows_them():
    """The tile of 16 KiB alone, as TMA needs no loads; of two branches, the one with more."""
    assert [ttir.wide_loads(SOURCE, threads) for threads in (128, 1024, 2048)] == [8, 1, 0]
    load = "%x = tt.load %p : tensor<1024x!tt.ptr<f32>> loc(#loc)"
    branches = ["scf.if %c {", load, "} else {", load, load, "} loc(#loc)", load]
    assert ttir.wide_loads("\n".join(["tt.func @f {", *branches, "}"]), 256) == 3


def test_products_without_tensor_core_are_counted():
    dot = "%y = tt.dot %a, %b, %c : tensor<64x64xf32, #d> * tensor<64x64xf32, #d> -> tensor<64x64x"
    assert ttir.plain_products(f"{dot}f32, #blocked1> loc(#loc)\n{dot}f32, #mma> loc(#loc)") == 1


def test_helping_warps_are_counted():
    assert ttir.warps('module attributes {"ttg.total-num-warps" = 12 : i32} {', 4) == 12
    assert ttir.warps("module {", 4) == 4


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "columns", "expected"),
    [
        (90, 128, 8, 0, 0, 2),  # 65536 / (128 * 256)
        (90, 188, 8, 160 * 1024, 0, 1),  # 161 KiB of 228
        (90, 108, 8, 64 * 1024, 0, 2),  # registers would allow 2, shared memory 3
        (90, 32, 4, 0, 0, 16),  # 64 warps
        (90, 16, 1, 0, 0, 32),  # 32 CTAs
        (90, 128, 1, 0, 0, 16),  # 4 warps a quarter
        (90, 168, 3, 0, 0, 4),  # 3 warps a quarter, 12 in all
        (90, 168, 12, 0, 0, 1),
        (90, 255, 9, 0, 0, 0),  # checked as 12 warps
        (90, 33, 4, 0, 0, 12),  # 40 registers are given, 5 * 256 a warp: 12 warps a quarter
        (90, 32, 8, 228 * 1024, 0, 0),  # above the 227 KiB of one CTA
        (80, 32, 8, 164 * 1024, 0, 0),
        (80, 64, 4, 80 * 1024, 0, 2),
        (100, 64, 4, 1024, 256, 2),  # half of the tensor memory each
    ],
)
def test_occupancy(arch, registers, warps, shared, columns, expected):
    assert ctas_per_sm(ARCHS[arch], registers, warps, shared, columns) == expected


def test_occupancy_is_a_share_of_warps():
    assert occupancy(ARCHS[90], 2, 8) == 0.25


def test_the_published_peaks_follow_from_the_tables():
    """TFLOP/s of the data sheets; those of the H200 and B200 are given at a lower clock."""
    peak = {a: x.tensor_flops * x.multiprocessors / 1e12 for a, x in ARCHS.items()}
    assert peak[80] * 1.41e9 == pytest.approx(312, rel=0.01)
    assert peak[90] * 1.83e9 == pytest.approx(989, rel=0.01)
    assert peak[100] * 1.86e9 == pytest.approx(2250, rel=0.01)


def test_the_bound_of_a_loop_by_hand():
    """One warpgroup: 64 x 192 x 16 products, 1 MUFU, 1 FFMA, 1 STS, of 7 instructions."""
    loop = sass.hot(code(*LOOP))
    source = ttir.Region(1, [ttir.Dot(64, 192, 16, "bf16")], [(64 * 16, 2)])
    found = bound(ARCHS[90], loop, source, ttir.Region(0), 4, streams=False)
    flops = 2 * 64 * 192 * 16
    assert found.flops == flops and found.per_flop["tensor"] == 1
    assert found.clocks["tensor"] == pytest.approx(flops / 4096)
    assert found.clocks["shared"] == pytest.approx((32 * (128 + 64 + 64) + 4 * 512) / 128)
    assert found.clocks["mufu"] == 128 / 16 and found.clocks["fp32"] == 128 / 128
    assert found.clocks["issue"] == sum(loop.counts.values()) * 4 / 4
    assert found.clocks["l2"] == pytest.approx(2048 / (5120 / 132), abs=0.1)
    assert found.unit == "tensor"
    assert found.tflops_max == pytest.approx(4096 * 132 * 1.98e9 / 1e12)
    assert found.tflops_sum < found.tflops_split < found.tflops_max
