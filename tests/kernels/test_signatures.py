"""One signature for each operation: in the reference, in both tables, and in kernels/README.md."""

import inspect
from pathlib import Path

import pytest

from minillm.ops import EAGER, OPERATIONS, REFERENCE, select

README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"


def parameters(function) -> str:
    """Names, kinds and defaults: `x, w, eps=1e-06`."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))[1:-1]


@pytest.mark.parametrize("name", OPERATIONS)
def test_signatures_are_one(name):
    wanted = parameters(getattr(REFERENCE, name))
    assert parameters(getattr(EAGER, name)) == wanted
    assert parameters(getattr(select("triton", "cpu"), name)) == wanted
    if README.exists():
        assert f"| `{name}` | `{wanted}` |" in README.read_text(encoding="utf-8")
