"""The tables of operations that the model calls, and the choice between them.

EAGER and Triton's table differ in speed only. select() chooses one for a whole run and says why.
REFERENCE defines the operations; tests and the profiler compare the other two with it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import ModuleType

import torch

from minillm.errors import UnavailableError, UsageError, parameter


@dataclass(frozen=True)
class Ops:
    """Table of the operations, each with the signature of its function in kernels/reference/.

    The fields of type Callable are the one list of operations; the tables are made from it.

    name: "reference", "eager" or "triton"
    why: reason for the choice of this table, to be printed
    """

    name: str
    rms_norm: Callable
    add_rms_norm: Callable
    sandwich_norm: Callable
    rope: Callable
    rope_cache: Callable
    attention: Callable
    decode_attention: Callable
    swiglu: Callable
    geglu: Callable
    relu2: Callable
    linear_cross_entropy: Callable
    adamw: Callable
    newton_schulz: Callable
    sample: Callable
    uniform: Callable
    why: str = ""


OPERATIONS = tuple(field.name for field in fields(Ops) if field.type is Callable)


def _table(name: str, *files: ModuleType) -> Ops:
    """Return the table of the operations that the files define."""
    found = {op: getattr(file, op) for file in files for op in OPERATIONS if hasattr(file, op)}
    return Ops(name, **found)


def _reference() -> Ops:
    from minillm.kernels.reference import attention, loss, mlp, norms, optim, rope, sampling

    return _table("reference", norms, rope, attention, mlp, loss, optim, sampling)


def _eager() -> Ops:
    from minillm.kernels.eager import attention, loss, mlp, norms, optim, rope, sampling

    return _table("eager", norms, rope, attention, mlp, loss, optim, sampling)


def _triton() -> Ops:
    """Return the table of our kernels; Triton is imported here and not before."""
    from minillm.kernels import (
        adamw,
        attention,
        decode_attention,
        linear_cross_entropy,
        newton_schulz,
        rms_norm,
        rope,
        rope_cache,
        sample,
        sandwich_norm,
        swiglu,
    )

    return _table(
        "triton", rms_norm, sandwich_norm, rope, rope_cache, attention, decode_attention, swiglu,
        linear_cross_entropy, adamw, newton_schulz, sample,
    )  # fmt: skip


REFERENCE = _reference()
EAGER = _eager()


def select(
    name: str,
    device: torch.device | str,
    *,
    d_model: int = 0,
    d_head: int = 0,
    vocab_size: int | None = 0,
    dropout: float = 0.0,
) -> Ops:
    """Return the table called `name` for `device`.

    name: "eager"; "triton"; or "auto", which is Triton on a GPU that can run the model with it, and
        eager otherwise
    device: device of the model
    d_model, d_head, vocab_size, dropout: settings of the model that will use the table (0: not
        known)

    Raises UsageError on another name, and UnavailableError with the reason if "triton" cannot run.
    """
    device = torch.device(device)
    if name == "eager":
        return replace(EAGER, why="asked for")
    if name not in ("auto", "triton"):
        raise UsageError(f"{parameter('kernels')} {name!r}: expected auto, eager or triton")
    if name == "auto" and device.type == "cpu":
        return replace(EAGER, why="on a CPU")
    obstacle = _obstacle_of_model(d_model, d_head, vocab_size, dropout) or _obstacle_of(device)
    if obstacle is None:
        return replace(_triton(), why="asked for" if name == "triton" else "on a GPU")
    if name == "triton":
        kernels = parameter("kernels")
        raise UnavailableError(f"{kernels} triton: {obstacle}; use {kernels} eager or auto")
    return replace(EAGER, why=obstacle)


def _obstacle_of_model(
    d_model: int, d_head: int, vocab_size: int | None, dropout: float
) -> str | None:
    """Return why the kernels cannot run such a model, or None if they can."""
    if dropout:
        return f"the attention kernel has no dropout (dropout is {dropout:g})"
    if d_head > 128:
        return f"the attention kernel's heads are at most 128 wide (d_head is {d_head})"
    if d_model > 16384:
        return f"the kernel of the norms takes rows of at most 16384 (d_model is {d_model})"
    if (vocab_size or 0) > 262144:
        return f"the kernels of the head take at most 262144 tokens (vocab_size is {vocab_size})"
    return None


def _obstacle_of(device: torch.device) -> str | None:
    """Return why the kernels cannot run on `device`, or None if they can. It runs the smallest one.

    On a CPU they run only where Triton's own variable TRITON_INTERPRET=1 has them interpreted.
    """
    try:
        from minillm.kernels import _launch, rms_norm
    except ImportError as e:
        return f"Triton is not installed ({e}); pip install triton"
    if device.type == "cpu" and not _launch.interpreted():
        return "no GPU; on a CPU set TRITON_INTERPRET=1 to have the kernels interpreted, slowly"
    if device.type not in ("cpu", "cuda"):
        return f"Triton does not run on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_80, the oldest supported"
    try:
        y = rms_norm.rms_norm(torch.ones(1, 16, device=device), torch.ones(16, device=device))
        right = (y - 1).abs().max().item() < 1e-3  # False if y is nan
    except Exception as e:  # any error of the compiler or the driver is the reason
        first_line = (str(e).strip() or type(e).__name__).splitlines()[0]
        return f"Triton fails on {device}: {first_line}"
    return None if right else f"Triton computes wrong results on {device}"
