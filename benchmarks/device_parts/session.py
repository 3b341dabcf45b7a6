"""The session of a part: the file of its rows, its time limit and its device.

torch is imported at the first use of the device, because a part that only starts other processes
needs none.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

Job = TypeVar("Job")
SPARE_S = 4  # before a part's limit: the last measurement begins before then


@dataclass(frozen=True)
class Session:
    """The file, the time and the device of a part.

    part: name of the part
    rows: file to which each row is appended
    end: time.monotonic() after which nothing new is begun
    dry: work on a CPU at tiny sizes
    scratch: folder for files that are not kept
    worker, workers: number of this worker process and of all, see `spread`; worker is None in the
        process of the part itself
    first: index of the first job of this worker
    """

    part: str
    rows: Path
    end: float
    dry: bool
    scratch: Path
    worker: int | None = None
    workers: int = 1
    first: int = 0

    def emit(self, **row: Any) -> None:
        """Append a row to the file of rows in one write, so that rows of processes do not mix."""
        line = json.dumps({"part": self.part, **row}, default=str) + "\n"
        with self.rows.open("ab", buffering=0) as file:
            file.write(line.encode())

    @property
    def over(self) -> bool:
        """Return whether the time is over."""
        return time.monotonic() > self.end

    def late(self, **where: Any) -> bool:
        """Return whether the time is over. If so, write a row that says so.

        where: columns that name the work that is left out
        """
        if not self.over:
            return False
        self.emit(**where, note="no time left")
        return True

    @contextmanager
    def noted(self, **where: Any) -> Iterator[None]:
        """Turn an exception into a row.

        where: columns that name the work that was attempted
        """
        from minillm.profiling.timing.implementations import error_in_words

        try:
            yield
        except Exception as e:
            self.emit(**where, note=error_in_words(e))

    @cached_property
    def device(self):
        """The GPU, or the CPU in a dry run."""
        import torch

        if self.dry:
            torch.set_num_threads(1)
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def dtype(self) -> str:
        """The dtype in which parts measure."""
        return "fp32" if self.dry else "bf16"

    @cached_property
    def triton(self):
        """The table of our kernels."""
        from minillm.ops import select

        return select("triton", self.device)

    @cached_property
    def roofs(self) -> dict[str, Any]:
        """Ceilings of this machine, see minillm.runtime.ceilings; any numbers in a dry run."""
        from minillm.runtime.ceilings import ceilings

        if self.dry:
            return {"fp32_tflops": 1.0, "memory_gbps": 10.0}
        return ceilings(self.device, ("bf16", "fp32"))

    def seconds(self, trial: Any, seconds: float = 0.05) -> float:
        """Return the median time of a trial in seconds.

        trial: the trial
        seconds: time to measure it for
        """
        from minillm.runtime.stopwatch import on_cpu, on_gpu

        if self.dry:
            return on_cpu([trial], 0.0)[0].median_us / 1e6
        return on_gpu(trial, seconds, self.device).median_us / 1e6

    def mine(self, jobs: Sequence[Job]) -> list[tuple[int, Job]]:
        """Return this process's share of the jobs, with their indices."""
        share = list(enumerate(jobs))[self.worker or 0 :: self.workers]
        return [(index, job) for index, job in share if index >= self.first]

    def spread(self, workers: int, share: float = 1.0) -> list[int]:
        """Run this part in some worker processes, and return their exit codes.

        workers: number of processes
        share: part of the time left that they may take
        """
        seconds = share * (self.end - time.monotonic())
        running = [
            subprocess.Popen(self._words(seconds, number, workers)) for number in range(workers)
        ]
        return [process.wait() for process in running]

    def begin_again_if_broken(self, first: int) -> None:
        """If the GPU has failed, replace this process by a new one that starts with job `first`.

        After an illegal access a GPU answers every further call of the same process with an error.
        """
        if not self._works():
            seconds = self.end - time.monotonic()
            print(f"the device has failed; a new process starts with job {first}", flush=True)
            os.execv(sys.executable, self._words(seconds, self.worker, self.workers, first))

    def _works(self) -> bool:
        import torch

        try:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True

    def _words(self, seconds: float, worker: int | None, workers: int, first: int = 0) -> list[str]:
        """Return the words that start this part in a process with a time limit in seconds."""
        words = [sys.executable, "-m", "benchmarks.device_parts", self.part]
        words += ["--rows", str(self.rows), "--scratch", str(self.scratch)]
        words += ["--limit", f"{seconds + SPARE_S:.1f}", *["--dry"] * self.dry]
        words += ["--workers", str(workers), "--first", str(first)]
        return words if worker is None else [*words, "--worker", str(worker)]
