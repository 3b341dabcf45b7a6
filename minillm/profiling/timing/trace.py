"""Trace training steps kernel by kernel, for ui.perfetto.dev or chrome://tracing."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from minillm.ops import select
from minillm.profiling.timing import steps
from minillm.runtime.device import synchronize

STEPS = 3


def write(path: Path, device: torch.device, dtype: str, quick: bool) -> str:
    """Trace STEPS steps of the model of the suite `model` and write the trace to `path`.

    It runs our kernels on a GPU that can, and eager code elsewhere. A path that ends with ".gz" is
    compressed.

    path: file of the trace, which must not exist
    device: device to run on
    dtype: dtype of the computation, such as "bf16"
    quick: trace a small model

    Returns a description of the traced steps.
    Raises OSError if the file exists or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("xb").close()  # before the work, so that an error comes early
    try:
        return _write(path, device, dtype, quick)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _write(path: Path, device: torch.device, dtype: str, quick: bool) -> str:
    ops = select("auto", device)
    step = steps.Step(steps.size(device.type, quick), ops, dtype, device)
    step()  # compiles, allocates
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True, acc_events=True) as traced:
        for n in range(STEPS):
            with record_function(f"step {n}"):
                step()
        synchronize(device)
    traced.export_chrome_trace(str(path))
    return f"{STEPS} steps, {ops.name} kernels ({ops.why})"
