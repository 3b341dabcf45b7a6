"""Errors of torch's own that are the machine's: code 4 and one line; ours stay bugs."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillm.runtime import launch, program
from minillm.runtime.launch import answered
from tests.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]


def made(module: str, name: str, text: str = "it", base: type = RuntimeError) -> Exception:
    """An error of a class that is called so, without the library that has it."""
    return type(name, (base,), {"__module__": module})(text)


def wrapped(inner: Exception, how: str) -> Exception:
    """What torch.compile makes of an error."""
    outer = made("torch._inductor.exc", "InductorError", f"{type(inner).__name__}: {inner}\n\nmore")
    setattr(outer, how, inner)
    return outer


NO_CXX = "No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')"
MACHINES = [
    *((wrapped(made("torch._inductor.exc", "InvalidCxxCompiler", NO_CXX), how), "--no-compile")
      for how in ("inner_exception", "__cause__", "__context__")),
    (made("torch._inductor.exc", "CppCompileError", "C++ compile error\n\nCommand:"), "g++"),
    (wrapped(PermissionError(13, "Permission denied", "/tmp/t"), "inner_exception"), "g++"),
    (wrapped(ImportError("failed to map segment from shared object"), "__cause__"), "g++"),
    (made("triton.runtime.errors", "OutOfResources", "shared memory"), "--kernels eager"),
    (made("torch.distributed", "DistNetworkError", "timed out", made(
        "torch.distributed", "DistError").__class__), "the network"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "--micro-batch-size"),
    (torch.AcceleratorError("CUDA error: no kernel image is available for execution"), "the torch"),
    (torch.AcceleratorError("CUDA error: out of memory"), "--micro-batch-size"),
    (RuntimeError("CUDA error: no kernel image is available for execution"), "--device cpu"),
    (RuntimeError("The NVIDIA driver on your system is too old (found version 1)"), "--device cpu"),
    (RuntimeError("Found no NVIDIA driver on your system."), "--device cpu"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling x"), "--device cpu"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), "--device cpu"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), "--micro-batch-size"),
    (RuntimeError("NCCL error in: x.cpp:1, unhandled system error"), "the network"),
    (RuntimeError("can't start new thread"), "--threads 1"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "--micro-batch-size"),
    (MemoryError(), "--micro-batch-size"),
]  # fmt: skip
OURS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    TypeError("GPT does not support len()"),
    wrapped(made("torch._inductor.exc", "LoweringException", "missing"), "inner_exception"),
    made("torch._dynamo.exc", "TorchRuntimeError", "shapes"),
    made("triton.compiler.errors", "CompilationError", "at 3:5"),
    made("triton.runtime.errors", "InterpreterError", "at 3:5"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    AssertionError("no"),
]


def raising(error: Exception):
    def body(argv):
        raise error

    return body


@pytest.mark.parametrize("error, words", MACHINES, ids=lambda x: str(x)[:40])
def test_what_the_machine_lacks_is_one_line_and_code_4(error, words, capsys):
    assert program.run("x.py", raising(error), []) == 4
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("x.py: error: ") and words in said, said
    assert "bug" not in said
    assert program.run("x.py", raising(error), ["--debug"]) == 4
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", OURS, ids=lambda x: str(x)[:40])
def test_faults_of_ours_are_still_bugs(error, capsys):
    assert program.run("x.py", raising(error), []) == 1
    assert "this is a bug in minillm" in capsys.readouterr().err


def test_a_bug_while_an_error_of_the_machine_is_handled_is_a_bug(capsys):
    def body(argv):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError:
            raise KeyError("micro") from None if argv else KeyError("micro")

    assert program.run("x.py", body, []) == 1
    assert program.run("x.py", body, ["x"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_torch_without_cuda_is_the_machines(capsys):
    assert program.run("x.py", lambda argv: torch.zeros(1, device="cuda"), []) == 4
    assert "--device cpu" in capsys.readouterr().err


def test_triton_without_a_c_compiler_is_the_machines(monkeypatch, tmp_path, capsys):
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)
    body = lambda argv: build._build("x", "x.c", str(tmp_path), [], [], [], [])  # noqa: E731
    assert program.run("x.py", body, []) == 4
    assert "Failed to find C compiler" in (said := capsys.readouterr().err), said
    assert "--kernels eager" in said


def test_a_package_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    found = lambda name: None if name == "torch" else object()  # noqa: E731
    monkeypatch.setattr(launch, "find_spec", found)
    assert answered("x.py", lambda argv: argv, []) == 4
    assert capsys.readouterr().err == (
        "x.py: error: torch: not installed here; install with pip install torch\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no C++ compiler")
def test_compile_without_a_compiler_is_one_line(tmp_path, text_file):
    flags = [word for pair in TINY.items() for word in pair]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--data", text_file, *flags, "--compile"],
        cwd=tmp_path, env={**os.environ, "PATH": "/nonexistent", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert "train with --no-compile" in done.stderr.splitlines()[-1]
