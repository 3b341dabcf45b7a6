"""Draw tokens in Triton: filter without a sort, then sample by inverse transform.

There is one program for each row. A filter keeps all tokens that reach a border. The border is
found as an integer that orders like the numbers do, from its highest bits down: each pass over the
row finds two more bits. All passes but the first read the row from a cache.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels._launch import DTYPES, launch, tile

WIDEST = 262144  # vocabulary: the largest size in the table of tiles; fp32 counts to 2^24


@triton.jit
def _load(ptr, start, V, BLOCK_V: tl.constexpr):
    """Return the logits start to start + BLOCK_V, fp32, -inf from V on, and their columns."""
    columns = start + tl.arange(0, BLOCK_V)
    x = tl.load(ptr + columns, mask=columns < V, other=float("-inf"))
    return x.to(tl.float32), columns


@triton.jit
def _weigh(x, peak, factor, lowest):
    """Return weights of logits: e^((x - peak) / temperature), at most 1, 0 below `lowest`."""
    return tl.where(x >= lowest, tl.exp2((x - peak) * factor), 0.0)


@triton.jit
def _ordered(x):
    """Return integers that order like the fp32 numbers x; -0 comes directly below 0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _border(
    ptr, V, wanted, peak, factor, lowest,
    MASS: tl.constexpr, PASSES: tl.constexpr, FIRST: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Return the highest integer that at least `wanted` logits, or weight of logits, reach.

    MASS: compare weights, whose integers are below 2^30, and add them; else count logits
    PASSES: number of pairs of bits to find
    FIRST: the lowest integer, from which the search starts
    """
    found = tl.full([], FIRST, tl.int32)
    for i in range(PASSES):
        step = tl.full([], 1, tl.int32) << (2 * (PASSES - 1 - i))
        one = found + step
        two = one + step
        three = two + step
        above_one = tl.zeros([BLOCK_V], tl.float32)
        above_two = tl.zeros([BLOCK_V], tl.float32)
        above_three = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, V, BLOCK_V):
            x, columns = _load(ptr, start, V, BLOCK_V)
            if MASS:
                weight = _weigh(x, peak, factor, lowest)
                key = weight.to(tl.int32, bitcast=True)
            else:
                weight = tl.where(columns < V, 1.0, 0.0)
                key = _ordered(x)
            above_one += tl.where(key >= one, weight, 0.0)
            above_two += tl.where(key >= two, weight, 0.0)
            above_three += tl.where(key >= three, weight, 0.0)
        found = tl.where(
            tl.sum(above_three, 0) >= wanted, three,
            tl.where(tl.sum(above_two, 0) >= wanted, two,
                     tl.where(tl.sum(above_one, 0) >= wanted, one, found)),
        )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["top_k"])
def _sample_kernel(
    logits_ptr, uniform_ptr, token_ptr, logits_stride, uniform_stride, V,
    temperature, factor, top_k, top_p, min_p,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    peaks = tl.full([BLOCK_V], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK_V):
        x, _ = _load(logits_ptr, start, V, BLOCK_V)
        peaks = tl.maximum(peaks, x)
    peak = tl.max(peaks, 0)
    if GREEDY:
        firsts = tl.full([BLOCK_V], V - 1, tl.int32)
        for start in range(0, V, BLOCK_V):
            x, columns = _load(logits_ptr, start, V, BLOCK_V)
            firsts = tl.minimum(firsts, tl.where(x == peak, columns, V - 1))
        tl.store(token_ptr + row, tl.min(firsts, 0).to(tl.int64))
    else:
        lowest = tl.full([], float("-inf"), tl.float32)
        if TOP_K:
            wanted = tl.full([], top_k, tl.int32).to(tl.float32)
            key = _border(
                logits_ptr, V, wanted, peak, factor, lowest, False, 16, -2147483648, BLOCK_V
            )  # fmt: skip
            border = _ordered(key.to(tl.float32, bitcast=True)).to(tl.float32, bitcast=True)
            # The reference compares after the division, whose rounding makes ties.
            scaled = tl.div_rn(border - peak, temperature)
            least = tl.full([BLOCK_V], float("inf"), tl.float32)
            for start in range(0, V, BLOCK_V):
                x, _ = _load(logits_ptr, start, V, BLOCK_V)
                kept = tl.div_rn(x - peak, temperature) >= scaled
                least = tl.minimum(least, tl.where(kept, x, float("inf")))
            lowest = tl.min(least, 0)
        floor = tl.full([], min_p, tl.float32)  # least weight to keep; the largest is 1
        if TOP_P:
            sums = tl.zeros([BLOCK_V], tl.float32)
            for start in range(0, V, BLOCK_V):
                x, _ = _load(logits_ptr, start, V, BLOCK_V)
                sums += _weigh(x, peak, factor, lowest)
            wanted = tl.sum(sums, 0) * top_p
            key = _border(logits_ptr, V, wanted, peak, factor, lowest, True, 15, 0, BLOCK_V)
            # The largest stay for any top_p: 0x3F800000 are the bits of 1.
            border = tl.minimum(key, 0x3F800000).to(tl.float32, bitcast=True)
            floor = tl.maximum(floor, border)
        # Both passes add the same numbers in fp64 in the same order, so the second reaches total.
        total = tl.full([], 0.0, tl.float64)
        for start in range(0, V, BLOCK_V):
            x, _ = _load(logits_ptr, start, V, BLOCK_V)
            weight = _weigh(x, peak, factor, lowest)
            total += tl.sum(tl.where(weight >= floor, weight, 0.0).to(tl.float64), 0)
        target = tl.load(uniform_ptr + row * uniform_stride).to(tl.float64) * total
        before = tl.full([], 0.0, tl.float64)
        token = tl.full([], 0, tl.int32) + (V - 1)
        for start in range(0, V, BLOCK_V):
            x, columns = _load(logits_ptr, start, V, BLOCK_V)
            weight = _weigh(x, peak, factor, lowest)
            weight = tl.where(weight >= floor, weight, 0.0).to(tl.float64)
            after = before + tl.sum(weight, 0)
            if (before <= target) & (after > target):
                mass = before + tl.cumsum(weight, 0)
                # Take the last token with mass if rounding leaves the cumulative sum below target.
                last = tl.max(tl.where(weight > 0, columns, -1), 0)
                token = tl.min(tl.where((weight > 0) & (mass > target), columns, last), 0)
            before = after
        tl.store(token_ptr + row, token.to(tl.int64))


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit(do_not_specialize=["seed", "B"])
def _uniform_kernel(
    samples_ptr, positions_ptr, u_ptr, samples_stride, positions_stride, seed, B,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = rows < B
    sample = tl.load(samples_ptr + rows * samples_stride, mask=mask, other=0)
    position = tl.load(positions_ptr + rows * positions_stride, mask=mask, other=0)
    golden = tl.full([BLOCK_B], 0x9E3779B97F4A7C15, tl.uint64)
    z = tl.full([BLOCK_B], seed, tl.int64).to(tl.uint64, bitcast=True) + golden
    z = _mix(_mix(z))
    z = _mix(_mix(z + sample.to(tl.uint64, bitcast=True) + golden))
    z = _mix(_mix(z + position.to(tl.uint64, bitcast=True) + golden))
    u = (z >> 40).to(tl.int32).to(tl.float32) * (1 / 16777216)  # 24 bits: exact
    tl.store(u_ptr + rows, u, mask=mask)


@torch.library.custom_op("minillm::sample", mutates_args=())
def _sample(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    B, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    token = torch.empty(B, dtype=torch.int64, device=logits.device)
    divisor = max(temperature, 1e-30)
    launch(
        _sample_kernel, (B,), logits, uniform, token, logits.stride(0), uniform.stride(0), V,
        divisor, 1 / (divisor * math.log(2)), top_k, top_p, min_p, GREEDY=temperature == 0,
        TOP_K=0 < top_k < V, TOP_P=top_p < 1, **tile("sample", "sample", V),
    )  # fmt: skip
    return token


@_sample.register_fake
def _(logits, uniform, temperature, top_k, top_p, min_p):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@torch.library.custom_op("minillm::uniform", mutates_args=())
def _uniform(seed: int, samples: Tensor, positions: Tensor) -> Tensor:
    u = torch.empty(samples.shape, dtype=torch.float32, device=samples.device)
    B, options = len(samples), tile("sample", "uniform", 1)
    launch(
        _uniform_kernel, (triton.cdiv(B, options["BLOCK_B"]),), samples, positions, u,
        samples.stride(0), positions.stride(0), seed, B, **options,
    )  # fmt: skip
    return u


@_uniform.register_fake
def _(seed, samples, positions):
    return samples.new_empty(samples.shape, dtype=torch.float32)


def sample(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Draw one token for each row by inverse transform, after the filters in argument order.

        p = softmax(logits / temperature) -> keep the top_k largest -> keep the smallest set of
        largest with mass >= top_p -> keep p >= min_p max(p);   token = min {t: cdf(t) > u cdf(V)}

    logits: (B, V), fp32, fp16 or bf16, V up to 262144, any stride between rows
    uniform: u of each row, (B,), floats in [0, 1)
    temperature: divisor of the logits (0: take the first of the largest logits)
    top_k: number of tokens to keep (0: all)
    top_p: probability mass to keep (1: all)
    min_p: least probability to keep, as a share of the largest (0: all)

    Returns tokens, (B,), int64. Filters keep ties at their borders. There is no gradient. Weights
    are fp32 and are added in fp64 for the draw, so the token is that of the reference unless u or a
    filter is within about 1e-7 of the border between two tokens.
    Raises ValueError on another dtype, shape or range.
    Cost: B V numbers from memory. From a cache, each row is read once for the largest logit and
    twice for the draw, 17 times more for top-k, and 16 times more for top-p, each with V
    exponentials.
    Source: Holtzman et al. 2019, arXiv:1904.09751; Nguyen et al. 2024, arXiv:2407.01082.
    """
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= WIDEST or logits.dtype not in DTYPES:
        wanted = f"(B, V), V from 1 to {WIDEST}, of one of {DTYPES}"
        raise ValueError(f"logits: {tuple(logits.shape)} {logits.dtype}, expected {wanted}")
    if uniform.shape != logits.shape[:1] or not uniform.is_floating_point():
        came = f"{tuple(uniform.shape)} {uniform.dtype}"
        raise ValueError(f"uniform: {came}, expected ({logits.shape[0]},) floats")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: {temperature}, expected 0 or more")
    if top_k < 0:
        raise ValueError(f"top_k: {top_k}, expected 0 or more")
    if not top_p >= 0:
        raise ValueError(f"top_p: {top_p}, expected 0 or more")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p: {min_p}, expected 0 to 1")
    return _sample(logits, uniform, float(temperature), top_k, float(top_p), float(min_p))


def uniform(seed: int, samples: Tensor, positions: Tensor) -> Tensor:
    """Return numbers in [0, 1) that depend on (seed, sample, position) alone, as in the reference.

        z <- 0;   for each of the three words w:  z <- mix(mix(z + w + 0x9E3779B97F4A7C15))
        u = floor(z / 2^40) / 2^24,   mix the finaliser of splitmix64, all modulo 2^64

    seed: any integer, taken modulo 2^64
    samples, positions: number of the sample, and of the token in it, (B,), int64, any strides

    Returns u, (B,), fp32, equal bit for bit to those of the reference.
    Raises ValueError on another dtype or shape.
    Cost: 20 B bytes.
    Source: Steele et al. 2014, "Fast splittable pseudorandom number generators", section 4.
    """
    for name, x in {"samples": samples, "positions": positions}.items():
        if x.dim() != 1 or x.shape != samples.shape or x.dtype != torch.int64:
            came = f"{tuple(x.shape)} {x.dtype}"
            raise ValueError(f"{name}: {came}, expected one (B,) int64 for both")
    seed &= (1 << 64) - 1
    return _uniform(seed - (1 << 64) if seed >> 63 else seed, samples, positions)
