"""Recognise errors that torch, Triton and NCCL raise because of the machine, and give advice.

They are recognised by their classes and by the modules that raise them, and plain RuntimeErrors of
torch's C++ code by their words. This file imports none of these libraries.
"""

import errno
import re
import subprocess
from collections.abc import Iterator

COMPILER = "see that a C++ compiler such as g++ works here, or train with --no-compile"
TRITON = "install gcc and Python's headers, or use --kernels eager"
DEVICE = "install the torch build for this driver and GPU, or use --device cpu"
RANKS = "check the network between the ranks and their GPUs"
MEMORY = "use a smaller model, --micro-batch-size or --num-samples"

# Advice by class, with its module; subclasses count.
CLASSES = {
    "torch._inductor.exc.InvalidCxxCompiler": COMPILER,
    "torch._inductor.exc.CppCompileError": COMPILER,
    "torch._inductor.exc.CUDACompileError": COMPILER,
    "triton.runtime.errors.OutOfResources": "use --kernels eager",
    "triton.runtime.errors.PTXASError": "use --kernels eager",
    "torch.distributed.DistError": RANKS,
    "torch.OutOfMemoryError": MEMORY,
    "builtins.MemoryError": MEMORY,
}
# Advice by module, for any error with this module in its traceback.
MODULES = {
    "torch._inductor.cpp_builder": COMPILER,
    "torch._inductor.cpu_vec_isa": COMPILER,
    "triton.runtime.build": TRITON,
    "triton.runtime.driver": TRITON,
}
# The function that initialises CUDA, and fails without a driver, a GPU or CUDA itself.
INITIALISATION = ("torch.cuda", "_lazy_init")
WORDS = {
    r"DefaultCPUAllocator|MPS backend out of memory|CUDA error: out of memory": MEMORY,
    r"can't start new thread": "end other programs, or use --threads 1",
    r"no kernel image is available|driver version is insufficient|driver on your system is too old"
    r"|Found no NVIDIA driver|no CUDA-capable device|initialization error|CUDA driver error"
    r"|device\(s\) is/are busy or unavailable|uncorrectable ECC error|unspecified launch failure"
    r"|system not yet initialized|forward compatibility was attempted|not compiled with CUDA"
    r"|(CUBLAS|CUSOLVER|CUDNN|CUFFT)_STATUS_(NOT_INITIALIZED|ALLOC_FAILED|ARCH_MISMATCH)": DEVICE,
    r"NCCL error|ncclSystemError|ncclUnhandledCudaError|ncclInternalError": RANKS,
}
# Errors of torch.compile if it cannot start a compiler, write its files or load the result.
OF_A_COMPILER = (OSError, ImportError, subprocess.SubprocessError)
# Messages of the device that mean a bug in a kernel.
OURS = re.compile("illegal memory access|device-side assert|misaligned address|invalid argument")


def advice(error: BaseException) -> tuple[str, str] | None:
    """Return the reason and the advice for an error that the machine caused, else None.

    The errors that led to this one are examined too, as torch.compile wraps them.
    """
    chain = list(_chain(error))
    compiling = any(_is_of(each, "torch._dynamo", "torch._inductor") for each in chain)
    for each in chain:
        what = _by_class(each) or _by_frames(each) or _by_words(each)
        if compiling and (what == TRITON or what is None and isinstance(each, OF_A_COMPILER)):
            what = COMPILER
        if what is not None:
            why = str(each).strip().splitlines() or [type(each).__name__]
            return ("out of memory" if what == MEMORY else "") or why[0], what
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and those that it was raised from, the first cause first.

    The error that was being handled when this one was raised counts only within torch and Triton.
    In our code this one may be a bug in the handling.
    """
    found: list[BaseException] = []
    queue = [error]
    while queue:
        each = queue.pop()
        if isinstance(each, BaseException) and each not in found:
            found.append(each)
            queue += [each.__cause__, getattr(each, "inner_exception", None)]
            queue += [each.__context__] if _is_of(each, "torch.", "triton.") else []
    yield from reversed(found)


def _by_class(error: BaseException) -> str | None:
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
    found = next((CLASSES[name] for name in names if name in CLASSES), None)
    if found is None and isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return MEMORY
    # All errors of the device have this class; a few of them are bugs of a kernel.
    if "torch.AcceleratorError" in names and not OURS.search(str(error)):
        return MEMORY if "out of memory" in str(error) else DEVICE
    return found


def _by_frames(error: BaseException) -> str | None:
    place = error.__traceback__
    while place is not None:
        code, module = place.tb_frame.f_code.co_name, place.tb_frame.f_globals.get("__name__")
        if module in MODULES:
            return MODULES[module]
        if (module, code) == INITIALISATION:
            return DEVICE
        place = place.tb_next
    return None


def _by_words(error: BaseException) -> str | None:
    if not isinstance(error, RuntimeError | AssertionError):
        return None
    return next((what for words, what in WORDS.items() if re.search(words, str(error))), None)


def _is_of(error: BaseException, *packages: str) -> bool:
    return type(error).__module__.startswith(packages)
