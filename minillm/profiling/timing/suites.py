"""Run the suites of `minillm profile` by name, and measure once what several of them need."""

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
from minillm.runtime.device import DTYPES, available_threads
from minillm.runtime.files import write_durably

QUICK_ARCH = 90  # the one architecture that --quick audits
COVERED = {  # audited operations by the name in CATALOGUE
    "rope": ("rope", "rope_cache"),
    "swiglu": ("swiglu", "geglu", "relu2"),
    "sample": ("sample", "uniform"),
}


@dataclass
class Job:
    """A request for measurements on one device.

    device: device to measure on
    ops: operations, for the suites that measure single ones
    dtype: dtype of the data
    quick: whether each suite takes seconds only
    about: facts about the machine; the ceilings are added to it
    say: called with each line of progress
    save: called with the name of a suite and its rows so far, which an interrupt then cannot lose
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
        """Time for each row."""
        return Effort(0.02, False) if self.quick else Effort()

    @cached_property
    def roofs(self) -> dict[str, Any]:
        """Ceilings of this machine, measured at the first access."""
        self.say(f"ceilings of {self.about['device']}")
        # Some operations have fp32 data with any --dtype.
        dtypes = tuple(DTYPES) if self.device.type == "cuda" else ("fp32", self.dtype)
        found = ceilings.ceilings(self.device, tuple(dict.fromkeys(dtypes)), self.quick)
        self.about["ceilings"] = found
        return found

    def kernels(self, save: Callable[[list[Row]], None]) -> list[Row]:
        """Return the rows of the suite `kernels`, which `roofline` needs too; measure them once."""
        if not self._kernels:
            chosen = problems_of(self.ops, self.device.type, self.dtype, self.quick)
            args = chosen, self.device, self.roofs, self.effort, self.say, save
            self._kernels = operations.run(*args)
        return self._kernels


def measure(job: Job, name: str, full: bool) -> tuple[list[Row], list[str]]:
    """Return the rows of the suite called `name` and, for the audit, the faults that it found.

    job: the request
    name: name of the suite
    full: audit all builds, not only those that every commit must pass

    Raises UnavailableError if the suite cannot run here.
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
    """Write audit.md: a line for each kernel and architecture, then a line for each build.

    folder: folder of the results
    rows: all rows of the audit in the folder, also those of earlier runs
    """
    from minillm.profiling.audit import audit

    path = folder / "audit.md"
    write_durably(path, f"{audit.summary(rows)}\n{audit.markdown(rows)}".encode())
    return path


def _audit(job: Job, full: bool) -> tuple[list[Row], list[str]]:
    """Return the rows of the static audit, and its faults in words."""
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
