"""Bridge to kernels/, which is next to minillm/ in a checkout and inside it in a wheel."""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(p) for p in (_here / "kernels", _here.parent / "kernels") if p.is_dir()]
