"""Part `step`: a training step of 162M parameters, 16 x 1024 tokens, by our kernels and eager."""

import time

from benchmarks.device_parts.session import Session
from minillm.config.train import ModelConfig
from minillm.ops import EAGER
from minillm.profiling.timing import steps
from minillm.profiling.timing.operations import Effort

SECONDS = 0.15  # a tenth of the time for the steps of a row
TINY = ModelConfig(vocab_size=64, seq_len=16, n_layer=1, n_head=2, d_model=32, qk_norm=True)


def run(session: Session) -> None:
    """Write a row for each table of kernels, and one of ours with twice the batch."""
    size = _size(session.dry)
    measure(session, "triton", size, session.triton)
    measure(session, "eager", size, EAGER)
    if not session.dry:
        measure(session, "triton", steps.Size(size.model, 2 * size.batch), session.triton)


def compiled(session: Session) -> None:
    """Write a row for each table of kernels under torch.compile."""
    size = _size(session.dry)
    measure(session, "compile", size, EAGER, compiled=not session.dry)
    if not session.dry:
        measure(session, "triton_compile", size, session.triton, compiled=True)


def measure(session: Session, name: str, size, ops, compiled: bool = False) -> None:
    """Write the row of one table of kernels.

    session: session of the part
    name: name of the row
    size: model and batch, steps.Size
    ops: table of operations
    compiled: whether torch.compile compiles the model
    """
    if session.late(implementation=name):
        return
    print(name, flush=True)
    effort, start = Effort(0.0 if session.dry else SECONDS), time.monotonic()
    row = steps.measured(
        name, size, ops, compiled, session.device, session.dtype, session.roofs, effort
    )
    session.emit(**row, seconds=round(time.monotonic() - start, 1))


def _size(dry: bool) -> steps.Size:
    return steps.Size(TINY, 1) if dry else steps.size("cuda", quick=False)
