"""Capacities and rates of a multiprocessor of each architecture, as NVIDIA publishes them.

Limits: CUDA C++ Programming Guide 13, section "Compute Capabilities", table "Technical
Specifications per Compute Capability". Rates of instructions, shuffles and shared memory: the same
guide, "Arithmetic Instructions", table "Throughput of Native Arithmetic Instructions", columns 8.0,
9.0 and 10.0. Rates of products, clocks, multiprocessors and bandwidths: "NVIDIA A100 Tensor Core
GPU Architecture" (whitepaper, 2020, tables 1 to 5), "NVIDIA H100 Tensor Core GPU Architecture"
(whitepaper, 2022, tables 1 to 3) and the data sheets of H200 and of B200 (HGX). Allocation of
registers and shared memory: cuda_occupancy.h of the CUDA toolkit.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """One architecture and the GPU that represents it; rates are per multiprocessor and clock."""

    name: str
    device: str
    multiprocessors: int
    clock_hz: float  # boost
    memory_bytes_per_s: float
    shared_bytes: int  # bytes of a multiprocessor
    shared_bytes_cta: int  # the most that one CTA may have
    tensor_flops: int  # dense, bf16 or fp16 into fp32
    fp32: int  # additions, multiplications, fused
    mufu: int = 16  # exp2, log2, reciprocal, root
    alu: int = 64  # compare, select, minimum, logic, shift, integer add, conversion
    imad: int = 64  # 32-bit integer multiply-add
    lanes: int = 32  # loads, stores and shuffles
    shared_rate: int = 128  # bytes
    l2_rate: float = 0.0  # bytes, of reads
    issue: int = 4  # instructions of warps
    registers: int = 65536
    warps: int = 64
    ctas: int = 32
    tensor_memory: int = 0  # columns

    @property
    def memory_rate(self) -> float:
        """Bytes of device memory for each multiprocessor and clock."""
        return self.memory_bytes_per_s / self.clock_hz / self.multiprocessors

    @property
    def chip_hz(self) -> float:
        """Clocks a second of all multiprocessors together."""
        return self.clock_hz * self.multiprocessors


KIB = 1024
# L2: the A100's whitepaper says 5120 bytes a clock. For the later two no figure is published. The
# same is assumed for the H100, and twice that for the B200, which has two dies.
ARCHS = {
    80: Arch(
        name="sm_80",
        device="A100 SXM 80 GB",
        multiprocessors=108,
        clock_hz=1.41e9,
        memory_bytes_per_s=2.039e12,
        shared_bytes=164 * KIB,
        shared_bytes_cta=163 * KIB,
        tensor_flops=2048,  # 312 TFLOP/s
        fp32=64,
        l2_rate=5120 / 108,
    ),
    90: Arch(
        name="sm_90",
        device="H200 SXM",
        multiprocessors=132,
        clock_hz=1.98e9,
        memory_bytes_per_s=4.8e12,
        shared_bytes=228 * KIB,
        shared_bytes_cta=227 * KIB,
        tensor_flops=4096,  # 989 TFLOP/s at 1.83 GHz
        fp32=128,
        l2_rate=5120 / 132,
    ),
    100: Arch(
        name="sm_100",
        device="B200",
        multiprocessors=148,
        clock_hz=1.965e9,
        memory_bytes_per_s=8.0e12,
        shared_bytes=228 * KIB,
        shared_bytes_cta=227 * KIB,
        tensor_flops=8192,  # 2250 TFLOP/s at 1.86 GHz
        fp32=128,
        l2_rate=2 * 5120 / 148,
        tensor_memory=512,
    ),
}


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def ctas_per_sm(
    arch: Arch, registers: int, warps: int, shared_bytes: int, tensor_columns: int = 0
) -> int:
    """Return the number of CTAs of a kernel that a multiprocessor holds at once; 0 if none fits.

    Registers are allocated in units of 256 for each warp, from four parts that share the warps.
    Shared memory is allocated in units of 128 bytes, after 1 KiB that the system takes for each
    CTA. A launch is checked as if each part gave as much as the one that gives most.

    arch: architecture of the GPU
    registers: registers of a thread
    warps: warps of a CTA, including those that the compiler adds
    shared_bytes: bytes of shared memory of a CTA
    tensor_columns: columns of tensor memory of a CTA
    """
    a_warp = _up(registers * 32, 256)
    if shared_bytes > arch.shared_bytes_cta or warps > arch.warps // 2:
        return 0
    if a_warp * _up(warps, 4) > arch.registers:
        return 0
    fitting = arch.registers // 4 // a_warp * 4 if a_warp else arch.warps
    limits = [fitting // warps, arch.warps // warps, arch.ctas]
    limits.append(arch.shared_bytes // _up(shared_bytes + KIB, 128))
    if tensor_columns:
        limits.append(arch.tensor_memory // tensor_columns)
    return min(limits)


def occupancy(arch: Arch, ctas: int, warps: int) -> float:
    """Return the warps of the resident CTAs as a share of those that fit, 0 to 1.

    arch: architecture of the GPU
    ctas: number of CTAs that a multiprocessor holds
    warps: warps of a CTA
    """
    return ctas * warps / arch.warps
