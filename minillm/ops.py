"""The switchboard: which functions the model calls. No other room of the model names kernels.

EAGER and the Triton table differ in speed only; select() chooses once, by argument, and says why.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from minillm.errors import UnavailableError, UsageError
from minillm.kernels import eager


@dataclass(frozen=True)
class Ops:
    """The hot operations of the model, each with the signature of minillm.kernels.reference.

    name: "eager" or "triton".    why: the reason for this table, to be printed.
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


EAGER = Ops(
    name="eager",
    rms_norm=eager.rms_norm,
    add_rms_norm=eager.add_rms_norm,
    sandwich_norm=eager.sandwich_norm,
    rope=eager.rope,
    rope_cache=eager.rope_cache,
    attention=eager.attention,
    decode_attention=eager.decode_attention,
    swiglu=eager.swiglu,
    geglu=eager.geglu,
    relu2=eager.relu2,
    linear_cross_entropy=eager.linear_cross_entropy,
    adamw=eager.adamw,
    newton_schulz=eager.newton_schulz,
    sample=eager.sample,
    uniform=eager.uniform,
)


def select(
    name: str,
    device: torch.device | str,
    *,
    d_model: int = 0,
    d_head: int = 0,
    vocab_size: int | None = 0,
    dropout: float = 0.0,
) -> Ops:
    """The table called `name` for `device`.

    name: "eager"; "triton"; or "auto", which takes Triton on a GPU where it can run the model, and
    eager otherwise. The whole table is one or the other.
    d_model, d_head, vocab_size, dropout: of the model that will use it, where there is one.
    Raises UnavailableError if "triton" cannot run, with the reason; UsageError on another name.
    """
    device = torch.device(device)
    if name == "eager":
        return replace(EAGER, why="asked for")
    if name not in ("auto", "triton"):
        raise UsageError(f"--kernels {name!r} is not one of auto, eager, triton")
    if name == "auto" and device.type == "cpu":
        return replace(EAGER, why="on a CPU")
    obstacle = _of_the_model(d_model, d_head, vocab_size, dropout) or _of_the_machine(device)
    if obstacle is None:
        return replace(_triton(), why="asked for" if name == "triton" else "on a GPU")
    if name == "triton":
        raise UnavailableError(f"--kernels triton: {obstacle}; use --kernels eager or auto")
    return replace(EAGER, why=obstacle)


def _of_the_model(d_model: int, d_head: int, vocab_size: int | None, dropout: float) -> str | None:
    """Why the kernels cannot run such a model; None if they can."""
    if dropout:
        return f"the attention kernel has no dropout (--dropout {dropout:g})"
    if d_head > 128:
        return f"the attention kernel's heads are at most 128 wide (--d-head {d_head})"
    if d_model > 16384:
        return f"the norm's kernel takes rows of at most 16384 (--d-model {d_model})"
    if (vocab_size or 0) > 262144:
        return f"the kernels of the head take at most 262144 tokens (--vocab-size {vocab_size})"
    return None


def _of_the_machine(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`, found out by running the smallest; None if they can.

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
        right = (y - 1).abs().max().item() < 1e-3  # false of NaN
    except Exception as e:  # whatever the compiler or the driver says is the reason
        first_line = (str(e).strip() or type(e).__name__).splitlines()[0]
        return f"Triton fails on {device}: {first_line}"
    return None if right else f"Triton computes wrongly on {device}"


def _triton() -> Ops:
    """The table of our kernels; Triton is imported here and not before."""
    from minillm.kernels import (
        adamw,
        attention,
        decode_attention,
        linear_cross_entropy,
        newton_schulz,
        rms_norm,
        rope,
        sample,
        swiglu,
    )

    return Ops(
        name="triton",
        rms_norm=rms_norm.rms_norm,
        add_rms_norm=rms_norm.add_rms_norm,
        sandwich_norm=rms_norm.sandwich_norm,
        rope=rope.rope,
        rope_cache=rope.rope_cache,
        attention=attention.attention,
        decode_attention=decode_attention.decode_attention,
        swiglu=swiglu.swiglu,
        geglu=swiglu.geglu,
        relu2=swiglu.relu2,
        linear_cross_entropy=linear_cross_entropy.linear_cross_entropy,
        adamw=adamw.adamw,
        newton_schulz=newton_schulz.newton_schulz,
        sample=sample.sample,
        uniform=sample.uniform,
    )
