"""Judging a kernel: by the reference in fp64, and by broken copies that must fail."""

import importlib.util
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from minillm.ops import REFERENCE

SERIAL = count()


@pytest.fixture
def device() -> torch.device:
    """Return the GPU if there is one, else the CPU, where kernels are interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def results(op: Callable, inputs: dict[str, Tensor], others: dict, seed: int) -> list[Tensor]:
    """Return the outputs of op, and the gradients of its float inputs for random dy."""
    leaves = {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
    y = op(**leaves, **others)
    y = list(y) if isinstance(y, tuple) else [y]
    numbers = torch.Generator().manual_seed(seed)
    dy = [torch.randn(t.shape, generator=numbers).to(t.device, torch.float64) for t in y]
    # Rounded to fp16's and bf16's common grid, so that every dtype is given the same gradients.
    dy = [d.bfloat16().half().to(t.dtype) for d, t in zip(dy, y, strict=True)]
    wanted = [x for x in leaves.values() if x.requires_grad]
    return [t.detach() for t in y] + list(torch.autograd.grad(y, wanted, dy))


def doubled(values: dict) -> dict:
    """Return the values, with float tensors in fp64."""
    is_float = {n: isinstance(x, Tensor) and x.is_floating_point() for n, x in values.items()}
    return {n: x.detach().double() if is_float[n] else x for n, x in values.items()}


def compare(ours: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    """Fail unless rms(ours - truth) <= 1.5 rms(plain - truth) + eps rms(truth), tensor by tensor.

    eps is the unit in the last place of our dtype at 1. There is no other tolerance.

    plain: results of the reference in our dtypes
    truth: results of the reference in fp64
    """
    for i, (y, p, t) in enumerate(zip(ours, plain, truth, strict=True)):
        assert y.shape == p.shape == t.shape and y.dtype == p.dtype, f"result {i}"
        if t.numel() == 0:
            continue
        allowed = 1.5 * rms(p.double() - t) + torch.finfo(y.dtype).eps * rms(t)
        error = rms(y.double() - t)
        assert error <= allowed, f"result {i}: rms error {error:.3g}, allowed {allowed:.3g}"


@pytest.fixture(name="compare")
def compare_fixture() -> Callable[..., None]:
    """Return `compare`, for results that are not the values and gradients of an operation."""
    return compare


def rms(x: Tensor) -> float:
    """Return the root mean square of all numbers in x."""
    return x.square().mean().sqrt().item()


@pytest.fixture
def check() -> Callable[..., None]:
    """Return check(op, inputs, **others), which compares values and all gradients of a Triton op.

    The reference gives the results in our dtypes and, from the same inputs in fp64, the truth.

    op: the function, named as in the reference
    inputs: tensors, in the dtypes and strides for the op
    others: further arguments
    """

    def run(op: Callable, inputs: dict[str, Tensor], **others) -> None:
        plain = getattr(REFERENCE, op.__name__)
        compare(
            results(op, inputs, others, 0),
            results(plain, inputs, others, 0),
            results(plain, doubled(inputs), doubled(others), 0),
        )

    return run


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[ModuleType, str, str], ModuleType]:
    """Return broken(module, old, new), which imports a copy of a file with one text replaced."""

    def make(module: ModuleType, old: str, new: str) -> ModuleType:
        text = Path(module.__file__).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {module.__file__}"
        name = f"broken_{next(SERIAL)}"
        text = text.replace(old, new).replace('"minillm::', f'"{name}::')
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        return copy

    return make
