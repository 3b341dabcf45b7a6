"""The suites of `minillm profile`, each by its name; what they share is measured once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minillm.errors import UnavailableError
from minillm.profiling.catalogue.problem import CATALOGUE, problems_of
from minillm.profiling.timing import decoding, operations, roofline, steps
from minillm.profiling.timing.operations import Effort, Row
from minillm.runtime import ceilings
from minillm.runtime.device import available_threads
from minillm.runtime.files import write_durably

QUICK_ARCH = 90  # what the audit of --quick compiles for
COVERED = {  # audited operations under a name of CATALOGUE
    "rope": ("rope", "rope_cache"),
    "swiglu": ("swiglu", "geglu", "relu2"),
    "sample": ("sample", "uniform"),
}


@dataclass
class Job:
    """What is measured, and on what.

    about: of the machine; the ceilings are added to it.    save: is given a suite's name and its
    rows so far, so that what ends the run does not take them along.
    """

    device: torch.device
    ops: tuple[str, ...]
    dtype: str
    quick: bool
    about: dict
    say: Callable[[str], None]
    save: Callable[[str, list[Row]], None] = lambda name, rows: None
    _kernels: list[Row] = field(default_factory=list)

    @property
    def effort(self) -> Effort:
        """How long each row may take."""
        return Effort(0.02, False) if self.quick else Effort()

    @cached_property
    def roofs(self) -> dict[str, Any]:
        """The ceilings of this machine, measured when first asked for."""
        self.say(f"ceilings of {self.about['device']}")
        # Whatever --dtype says, some operations have fp32 data.
        dtypes = tuple(ceilings.DTYPES) if self.device.type == "cuda" else ("fp32", self.dtype)
        found = ceilings.ceilings(self.device, tuple(dict.fromkeys(dtypes)), self.quick)
        self.about["ceilings"] = found
        return found

    def kernels(self, save: Callable[[list[Row]], None]) -> list[Row]:
        """The rows of the suite `kernels`, which `roofline` is drawn from; measured once."""
        if not self._kernels:
            chosen = problems_of(self.ops, self.device.type, self.dtype, self.quick)
            args = chosen, self.device, self.roofs, self.effort, self.say, save
            self._kernels = operations.run(*args)
        return self._kernels


def measure(job: Job, name: str, full: bool) -> tuple[list[Row], list[str]]:
    """The rows of the suite called `name` and, of the audit, the faults that it found.

    full: audit everything.    Raises UnavailableError if the suite cannot run here.
    """
    if name == "kernels":
        return job.kernels(lambda rows: job.save(name, rows)), []
    if name == "roofline":
        rows = job.kernels(lambda rows: job.save(name, roofline.rows(rows, job.roofs)))
        return roofline.rows(rows, job.roofs), []
    if name == "model":
        return steps.run(job.device, job.dtype, job.roofs, job.effort, job.quick, job.say), []
    if name == "decode":
        return decoding.run(job.device, job.dtype, job.effort, job.quick, job.say), []
    return _audit(job, full)


def write_audit(folder: Path, rows: list[Row]) -> Path:
    """audit.md, for a reader: a line a kernel and architecture, and below a line a build.

    rows: all that the folder has of the audit, those of other operations that stayed as well.
    """
    from minillm.profiling.audit import audit

    path = folder / "audit.md"
    write_durably(path, f"{audit.summary(rows)}\n{audit.markdown(rows)}".encode())
    return path


def _audit(job: Job, full: bool) -> tuple[list[Row], list[str]]:
    """The rows of the static audit, and its faults in words."""
    try:
        from triton import knobs

        from minillm.profiling.audit import audit, cases
    except ImportError as e:
        raise UnavailableError(f"the audit needs Triton, and it is not installed ({e})") from None
    if knobs.runtime.interpret:
        raise UnavailableError("the audit compiles, and TRITON_INTERPRET interprets: unset it")
    chosen = cases.full() if full else cases.subset()
    if job.quick and not full:
        chosen = [case for case in chosen if case.arch == QUICK_ARCH]
    wanted = {name for op in job.ops for name in COVERED.get(op, (op,))}
    if set(job.ops) != set(CATALOGUE):
        chosen = [case for case in chosen if case.op in wanted]
    job.say(f"audit of {len(chosen)} cases")
    workers = min(available_threads(), len(chosen))
    rows = audit.audit(chosen, workers if workers > 1 else 0, job.say)
    faults = [
        f"{row['kernel']} {row['config']} {row['arch']}: {fault}"
        for row in rows
        for fault in audit.faults(row)
    ]
    return rows, faults
