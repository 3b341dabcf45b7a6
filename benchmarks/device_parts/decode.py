"""Part `decode`: new tokens a second, by our kernels and eager."""

import torch

from benchmarks.device_parts.session import Session
from benchmarks.device_parts.step import TINY
from minillm.model.gpt import GPT
from minillm.ops import EAGER
from minillm.profiling.timing import decoding
from minillm.profiling.timing.operations import Effort, release
from minillm.runtime.device import DTYPES

CELLS = ((1, 1024), (16, 4096), (64, 1024), (1, 16384))  # batch, context; the usual ones first
SECONDS = 0.25  # half the time for the tokens of a row


def run(session: Session) -> None:
    """Write a row for each table of kernels, batch and context."""
    cells = ((1, 8),) if session.dry else CELLS
    longest = max(context for _, context in cells) + 1
    config = TINY if session.dry else decoding.shape("cuda", longest)
    effort = Effort(0.0 if session.dry else SECONDS)
    for name, ops in (("triton", session.triton), ("eager", EAGER)):
        numbers = torch.Generator().manual_seed(0)
        model = GPT(config, ops, DTYPES[session.dtype], numbers).to(session.device).eval()
        for cell in cells:
            where = {"implementation": name, "batch": cell[0], "context": cell[1]}
            if session.late(**where):
                continue
            print(*where.values(), flush=True)
            with session.noted(**where):
                session.emit(**decoding.measured(name, cell, model, session.device, effort))
            release(session.device)
