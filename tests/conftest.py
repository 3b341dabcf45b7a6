"""What every test stands on: one thread, seeded numbers, and memory in which nothing was written
holds NaN, so that a read of it shows."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import settings
from torch import Tensor

settings.register_profile("house", deadline=None, derandomize=True, database=None)
settings.load_profile("house")
torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """The same numbers in every run."""
    return torch.Generator().manual_seed(1337)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and torch.empty_like hand out NaN (integers: the lowest there is)."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args, **kwargs) -> Tensor:
        x = make(*args, **kwargs)
        if x.dtype == torch.bool:
            return x
        floating = x.is_floating_point() or x.is_complex()
        with torch.no_grad():
            return x.fill_(torch.nan if floating else torch.iinfo(x.dtype).min)

    return poisoned


@pytest.fixture
def no_worse() -> Callable[..., None]:
    """The one rule of tolerance: no_worse(ours, yardstick, truth), the results of one computation.

    Against the truth in float64, each of ours errs at most 1.5 times as much as the yardstick, a
    plain computation in the same dtype, plus one unit in the last place of the largest value: among
    the results, or `on_the_way`, where larger ones cancel. In float64, where the yardstick is the
    truth, that unit is 1e-12.
    """

    def check(
        ours: Sequence[Tensor],
        yardstick: Sequence[Tensor],
        truth: Sequence[Tensor],
        on_the_way: float = 0.0,
    ) -> None:
        scale = max(on_the_way, *(x.abs().max().item() for x in truth))
        for y, plain, exact in zip(ours, yardstick, truth, strict=True):
            assert y.dtype == plain.dtype and exact.dtype == torch.float64
            assert y.shape == plain.shape == exact.shape
            unit = 1e-12 if y.dtype == torch.float64 else torch.finfo(y.dtype).eps
            allowed = 1.5 * (plain.double() - exact).abs().max() + unit * scale
            error = (y.double() - exact).abs().max()
            assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    return check
