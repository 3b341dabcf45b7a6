"""Part `compile`: the training step of the part `step` under torch.compile.

It is apart from `step` because the compiler takes most of its time. A dry run does not compile.
"""

from benchmarks.device_parts import step
from benchmarks.device_parts.session import Session


def run(session: Session) -> None:
    """Write a row each for eager code and for our kernels."""
    step.compiled(session)
