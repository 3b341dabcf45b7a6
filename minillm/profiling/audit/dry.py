"""A GPU that does not exist: Triton compiles launches for an architecture and does not run them.

The audit therefore sees exactly the code that would run, because the launcher, the tile and the
specialisation of arguments are the same. Results of the operations are undefined.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver, jit


@dataclass(frozen=True)
class Build:
    """One launch: its compiled kernel, and the grid and arguments by name.

    kernel: None if it did not compile; then `error` is the reason
    constants: the constexpr arguments by name
    seconds: time of the launch, which is mostly that of the compiler, or almost 0 if Triton's cache
        has the kernel
    """

    kernel: CompiledKernel | None
    grid: tuple[int, ...]
    arguments: dict
    name: str
    constants: dict = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""


class _Utils:
    """Part of Triton's CUDA driver that loads binaries; it accepts each one and loads none."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 132}

    def load_binary(self, name, kernel, shared, device):
        return None, None, 0, 0, 1024


class _Driver:
    """Driver for triton.runtime, of a target without a device."""

    def __init__(self, arch: int) -> None:
        self.target, self.utils = GPUTarget("cuda", arch, 32), _Utils()

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # one cache of compiled kernels for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source, metadata):
        return lambda *args: None


@contextmanager
def dry_gpu(arch: int) -> Iterator[list[Build]]:
    """Compile and list the Triton launches on CPU tensors inside the `with`, for sm_`arch`.

    A launch that does not compile is listed too, and raises.

    arch: 80, 90, 100, ...

    Raises RuntimeError under TRITON_INTERPRET, which compiles nothing. The variable must be unset
    before Triton is imported, because Triton decides at import how its own functions run.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles nothing")
    builds: list[Build] = []
    run = jit.JITFunction.run

    def listed(self, *args, grid, warmup, **kwargs):
        names = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        constants = {
            p.name: names[p.name] for p in self.params if p.is_constexpr and p.name in names
        }
        kernel, error, start = None, "", time.perf_counter()
        try:
            kernel = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
            raise
        finally:
            seconds = time.perf_counter() - start
            shape = tuple(grid) if isinstance(grid, (tuple, list)) else ()
            builds.append(Build(kernel, shape, names, self.fn.__name__, constants, seconds, error))
        return kernel

    before = driver._active
    driver.set_active(_Driver(arch))
    jit.JITFunction.run = listed
    try:
        yield builds
    finally:
        jit.JITFunction.run = run
        driver.set_active(before)
