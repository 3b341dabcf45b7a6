"""How a kernel is judged: by the reference in fp64, and by what breaking it does."""

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
    """The GPU if there is one, else the CPU, where kernels are interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def results(op: Callable, inputs: dict[str, Tensor], others: dict, seed: int) -> list[Tensor]:
    """The outputs of op, and the gradients of its floating inputs for random output gradients."""
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
    """The floating tensors among the values, in fp64."""
    is_float = {n: isinstance(x, Tensor) and x.is_floating_point() for n, x in values.items()}
    return {n: x.detach().double() if is_float[n] else x for n, x in values.items()}


def compare(ours: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    """Fail unless rms(ours - truth) <= 1.5 rms(plain - truth) + eps rms(truth), tensor by tensor.

    plain: the reference's results in our dtypes.    truth: its results in fp64.    eps: the unit
    in the last place of our dtype at 1. No other number is allowed here.
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
    """The rule alone, for results that are not an operation's values and gradients."""
    return compare


def rms(x: Tensor) -> float:
    """The root mean square of all numbers in x."""
    return x.square().mean().sqrt().item()


@pytest.fixture
def check() -> Callable[..., None]:
    """check(op, inputs, **others): values and all gradients of a Triton op against the reference's.

    op: named as in reference.    inputs: tensors, in the dtypes and strides the op shall see.
    others: further arguments. The same inputs, in fp64, give the truth.
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
    """broken(module, old, new): a copy of a kernel's file with one piece of its text exchanged."""

    def make(module: ModuleType, old: str, new: str) -> ModuleType:
        text = Path(module.__file__).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {module.__file__}"
        name = f"broken_{next(SERIAL)}"
        text = text.replace(old, new).replace('"minillm::', f'"{name}::')
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        return copy

    return make
