"""At which sizes each operation is measured: on a GPU, on a CPU, in a hurry, in the interpreter."""

from minillm.profiling.timing.workloads import Problem

TOKENS, WIDTH = 16384, 2048

# Beside attention, whose sizes on a GPU are made below.
GPU: dict[str, list[dict[str, int]]] = {
    "decode_attention": [
        {"B": 1, "S": 16384, "H": 16, "G": 16, "D": 128},
        {"B": 16, "S": 8192, "H": 32, "G": 8, "D": 128},
        {"B": 64, "S": 2048, "H": 16, "G": 16, "D": 64},
    ],
    "rms_norm": [{"N": TOKENS, "C": WIDTH}],
    "add_rms_norm": [{"N": TOKENS, "C": WIDTH}],
    "sandwich_norm": [{"N": TOKENS, "C": WIDTH}],
    "rope": [{"B": 8, "T": 2048, "H": 16, "G": 16, "D": 128}],
    "swiglu": [{"N": TOKENS, "F": 5632}],
    "adamw": [{"L": 12, "C": 768}],
    "linear_cross_entropy": [
        {"N": TOKENS, "C": WIDTH, "V": 50304},
        {"N": TOKENS, "C": WIDTH, "V": 32768},
    ],
    "newton_schulz": [{"B": 12, "M": 768, "N": 3072}, {"B": 4, "M": 2048, "N": 2048}],
    "sample": [{"B": 64, "V": 50304}],
}
CPU: dict[str, list[dict[str, int]]] = {
    "attention": [
        {"B": 8, "T": 256, "H": 2, "D": 64},
        {"B": 2, "T": 1024, "H": 2, "D": 64},
        {"B": 2, "T": 1024, "H": 1, "D": 128},
    ],
    "decode_attention": [{"B": 4, "S": 1024, "H": 4, "G": 2, "D": 64}],
    "rms_norm": [{"N": 4096, "C": 256}],
    "add_rms_norm": [{"N": 4096, "C": 256}],
    "sandwich_norm": [{"N": 4096, "C": 256}],
    "rope": [{"B": 8, "T": 256, "H": 4, "G": 4, "D": 64}],
    "swiglu": [{"N": 2048, "F": 704}],
    "adamw": [{"L": 2, "C": 256}],
    "linear_cross_entropy": [{"N": 1024, "C": 128, "V": 4096}],
    "newton_schulz": [{"B": 4, "M": 128, "N": 512}],
    "sample": [{"B": 8, "V": 50304}],
}
# Odd on purpose: in the interpreter nothing is timed, and masks show only where tiles do not fit.
SMALL: dict[str, dict[str, int]] = {
    "attention": {"B": 1, "T": 77, "H": 2, "D": 64},
    "decode_attention": {"B": 2, "S": 77, "H": 2, "G": 1, "D": 64},
    "rms_norm": {"N": 37, "C": 200},
    "add_rms_norm": {"N": 37, "C": 200},
    "sandwich_norm": {"N": 37, "C": 200},
    "rope": {"B": 1, "T": 19, "H": 3, "G": 1, "D": 64},
    "swiglu": {"N": 19, "F": 200},
    "adamw": {"L": 1, "C": 40},
    "linear_cross_entropy": {"N": 37, "C": 48, "V": 301},
    "newton_schulz": {"B": 2, "M": 40, "N": 72},
    "sample": {"B": 3, "V": 301},
}
OPS = tuple(SMALL)


def problems(ops: tuple[str, ...], kind: str, dtype: str, quick: bool = False) -> list[Problem]:
    """The problems of some operations.

    kind: "cuda" or "cpu".    dtype: of all but `sample`, whose logits are fp32 wherever it is
    called.    quick: one problem an operation, on a CPU an eighth as large.
    """
    table = {"attention": _attention_on_gpu(), **GPU} if kind == "cuda" else CPU
    found = []
    for op in ops:
        sizes = table[op]
        if quick:
            sizes = [sizes[len(sizes) // 2]] if kind == "cuda" else [_smaller(sizes[0])]
        found += [Problem(op, size, _dtype(op, dtype)) for size in sizes]
    return found


def small(op: str, dtype: str) -> Problem:
    """A problem that the interpreter solves in a second or so."""
    return Problem(op, SMALL[op], _dtype(op, dtype))


def _dtype(op: str, dtype: str) -> str:
    return "fp32" if op == "sample" else dtype


def _attention_on_gpu() -> list[dict[str, int]]:
    """{D64, D128} x {1k ... 16k} at equally many tokens and at equal width, and some with options.

    These are: four queries to a key, a window, packed documents, a soft-cap.
    """
    lengths = [1024 << i for i in range(5)]
    shapes = [(T, D) for D in (64, 128) for T in lengths]
    plain = [{"B": TOKENS // T, "T": T, "H": WIDTH // D, "D": D} for T, D in shapes]
    some, long = ({"B": TOKENS // T, "T": T, "H": 16, "D": 128} for T in (4096, TOKENS))
    return [*plain, {**some, "G": 4}, {**long, "W": 1024}, {**long, "docs": 8}, {**some, "cap": 30}]


def _smaller(size: dict[str, int]) -> dict[str, int]:
    longest = max(size, key=lambda letter: size[letter] if letter in "BTSNLMV" else 0)
    return {**size, longest: max(1, size[longest] // 8)}
