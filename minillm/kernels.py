"""The bridge to kernels/: in a checkout it stands beside minillm/, in a wheel inside it."""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(p) for p in (_here / "kernels", _here.parent / "kernels") if p.is_dir()]
