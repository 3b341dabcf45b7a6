"""The switchboard: which functions the model calls. The only room that names kernels.

EAGER and the Triton table differ in speed only; select() chooses once, by argument, and says why.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minillm.errors import UnavailableError, UsageError
from minillm.kernels import eager


@dataclass(frozen=True)
class Ops:
    """The hot operations of the model, each with the signature of minillm.kernels.reference."""

    name: str
    rms_norm: Callable
    rope: Callable
    attention: Callable
    decode_attention: Callable
    swiglu: Callable
    geglu: Callable
    relu2: Callable
    linear_cross_entropy: Callable
    newton_schulz: Callable
    sample: Callable


EAGER = Ops(
    name="eager",
    rms_norm=eager.rms_norm,
    rope=eager.rope,
    attention=eager.attention,
    decode_attention=eager.decode_attention,
    swiglu=eager.swiglu,
    geglu=eager.geglu,
    relu2=eager.relu2,
    linear_cross_entropy=eager.linear_cross_entropy,
    newton_schulz=eager.newton_schulz,
    sample=eager.sample,
)


def select(name: str, device: torch.device | str) -> Ops:
    """The table called `name` for `device`.

    name: "eager", "triton", or "auto", which takes the fastest that runs here.
    Raises UnavailableError if "triton" cannot run, with the reason; UsageError on another name.
    """
    if name in ("auto", "eager"):
        return EAGER
    if name == "triton":
        raise UnavailableError(
            f"--kernels triton: this version of minillm has no Triton kernels (device {device}); "
            "use --kernels eager or auto"
        )
    raise UsageError(f"--kernels {name!r} is not one of auto, eager, triton")
