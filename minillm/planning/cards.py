"""Table of GPUs for `minillm plan --gpu NAME`: memory, bandwidth, arithmetic rates and links.

Rates are the dense ones of the makers' data sheets, without structured sparsity, and for the tensor
cores those with fp32 accumulation, which is what training uses. They are upper limits and none of
them was measured here. The share of them that training reaches is an assumption, see below.
"""

import re
from dataclasses import dataclass

from minillm.errors import UsageError, parameter
from minillm.runtime.cli import nearest

GIB = 2**30
# Assumed where neither a card's sheet nor a flag of `minillm plan` says otherwise.
MFU = 0.4  # share of the peak rate that training reaches
OVERLAP = 0.7  # share of the communication that runs during the computation
LATENCY_US = 5.0  # latency of a message between GPUs
NODE_GPUS = 8
HOST_GBS = 25.0  # between a GPU and the memory of its host
TRITON_CAPABILITY = (8, 0)  # the oldest compute capability that the Triton kernels support


@dataclass(frozen=True)
class Card:
    """One GPU, as its maker describes it.

    name: what --gpu takes
    title: maker's name, with form factor (SXM or PCIe) and nominal memory
    capability: CUDA compute capability, (major, minor)
    memory_gib: memory that PyTorch reports as total, GiB (nominal size less ECC and firmware)
    memory_gbs: bandwidth of that memory, GB/s
    half_tflops: dense fp16 tensor rate with fp32 accumulation; bf16 is the same where there is any
    fp32_tflops: fp32 rate outside of the tensor cores, as TF32 is off by default
    link: name of the link to the other GPUs of a node
    link_gbs: bandwidth of that link in one direction, GB/s
    network_gbs: assumed network bandwidth between nodes in one direction, GB/s per GPU
    network: the machine that network_gbs is taken from
    source: title of the data sheet
    """

    name: str
    title: str
    capability: tuple[int, int]
    memory_gib: float
    memory_gbs: float
    half_tflops: float
    fp32_tflops: float
    link: str
    link_gbs: float
    network_gbs: float
    network: str
    source: str

    @property
    def has_bf16(self) -> bool:
        """Return whether the tensor cores multiply bf16; before Ampere they do not."""
        return self.capability >= (8, 0)

    @property
    def runs_triton(self) -> bool:
        """Return whether the Triton kernels support this card."""
        return self.capability >= TRITON_CAPABILITY

    def peak_flops(self, dtype: str) -> float:
        """Return the dense rate in FLOP/s for dtype "fp32", "fp16" or "bf16".

        Raises UsageError for bf16 on a card without it.
        """
        if dtype == "bf16" and not self.has_bf16:
            raise UsageError(
                f"{parameter('dtype')} bf16: {self.title} has no bf16 arithmetic; use "
                f"{parameter('dtype')} fp16 or fp32"
            )
        return 1e12 * (self.fp32_tflops if dtype == "fp32" else self.half_tflops)


# One network port per GPU: DGX H100 has eight of 400 Gbit/s, DGX A100 eight of 200 Gbit/s, and
# DGX-1 four of 100 Gbit/s for eight GPUs. For PCIe cards 100 Gbit/s for a node of eight is assumed.
_H100_NET = (50.0, "400 Gbit/s per GPU, as in a DGX H100")
_A100_NET = (25.0, "200 Gbit/s per GPU, as in a DGX A100")
_V100_NET = (6.25, "four ports of 100 Gbit/s for 8 GPUs, as in a DGX-1")
_PCIE_NET = (100 / 8 / 8, "one port of 100 Gbit/s for 8 GPUs")

# memory_gib is the total that PyTorch states in its out-of-memory messages for these cards; of
# several such figures the smallest.
CARDS = (
    Card("h200", "H200 SXM 141 GB", (9, 0), 139.7, 4800, 989.4, 66.9, "NVLink 4", 450, *_H100_NET,
         "NVIDIA H200 Tensor Core GPU Datasheet"),
    Card("h100", "H100 SXM 80 GB", (9, 0), 79.1, 3350, 989.4, 66.9, "NVLink 4", 450, *_H100_NET,
         "NVIDIA H100 Tensor Core GPU Datasheet; H100 Tensor Core GPU Architecture whitepaper"),
    Card("a100-80", "A100 SXM 80 GB", (8, 0), 79.1, 2039, 312, 19.5, "NVLink 3", 300, *_A100_NET,
         "NVIDIA A100 Tensor Core GPU Datasheet"),
    Card("a100-40", "A100 SXM 40 GB", (8, 0), 39.3, 1555, 312, 19.5, "NVLink 3", 300, *_A100_NET,
         "NVIDIA A100 Tensor Core GPU Datasheet"),
    Card("l40s", "L40S PCIe 48 GB", (8, 9), 44.3, 864, 362.05, 91.6, "PCIe 4.0 x16", 32, *_PCIE_NET,
         "NVIDIA L40S Datasheet"),
    Card("rtx-5090", "GeForce RTX 5090 PCIe 32 GB", (12, 0), 31.3, 1792, 209.5, 104.8,
         "PCIe 5.0 x16", 64, *_PCIE_NET, "NVIDIA RTX Blackwell GPU Architecture whitepaper"),
    Card("rtx-4090", "GeForce RTX 4090 PCIe 24 GB", (8, 9), 23.5, 1008, 165.2, 82.6,
         "PCIe 4.0 x16", 32, *_PCIE_NET, "NVIDIA Ada GPU Architecture whitepaper"),
    Card("rtx-3090", "GeForce RTX 3090 PCIe 24 GB", (8, 6), 23.5, 936, 71, 35.6,
         "PCIe 4.0 x16", 32, *_PCIE_NET, "NVIDIA Ampere GA102 GPU Architecture whitepaper"),
    Card("t4", "T4 PCIe 16 GB", (7, 5), 14.5, 300, 65, 8.1, "PCIe 3.0 x16", 16, *_PCIE_NET,
         "NVIDIA T4 Tensor Core GPU Datasheet"),
    Card("v100", "V100 SXM2 16 GB", (7, 0), 15.7, 900, 125, 15.7, "NVLink 2", 150, *_V100_NET,
         "NVIDIA V100 Tensor Core GPU Datasheet"),
    Card("v100-32", "V100 SXM2 32 GB", (7, 0), 31.7, 900, 125, 15.7, "NVLink 2", 150, *_V100_NET,
         "NVIDIA V100 Tensor Core GPU Datasheet"),
)  # fmt: skip
NAMES = tuple(card.name for card in CARDS)
# Other names that people use. A name without a size means the card with less memory.
SYNONYMS = {"a100": "a100-40", "v100-16": "v100"}


def find(text: str) -> Card:
    """Return the card called `text`: "h100", "RTX 4090", "rtx4090", "4090", "A100-80GB".

    Raises UsageError, with the nearest name and all names, for any other.
    """
    known = {_plain(card.name): card for card in CARDS}
    known |= {_plain(name): known[_plain(real)] for name, real in SYNONYMS.items()}
    key = _plain(text)
    if key in known:
        return known[key]
    near = nearest(key, known)
    hint = f"did you mean {known[near].name}? " if near else ""
    raise UsageError(
        f"{parameter('gpu')} {text!r} is not a known card; {hint}known: {', '.join(NAMES)}"
    )


def _plain(name: str) -> str:
    """Reduce a card's name to lower-case letters and digits, without maker, series and units."""
    return re.sub(r"nvidia|geforce|tesla|rtx|sxm\d?|pcie|gb\b|[^a-z0-9]", "", name.lower())


def of_device(name: str, total_bytes: int) -> Card | None:
    """Return the card of the table that a CUDA device is, or None.

    name: what CUDA calls it, such as "NVIDIA H100 80GB HBM3"
    total_bytes: its memory, which distinguishes cards of one name
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    if "pcie" in words or "laptop" in words or "nvl" in words:
        return None  # another form factor, with other rates and links
    for card in CARDS:
        family = card.name.removeprefix("rtx-").partition("-")[0]
        near = abs(total_bytes / GIB - card.memory_gib) < 0.05 * card.memory_gib
        if near and family in words:
            return card
    return None
