"""Bridge to train.py and sample.py: above minillm/ in a checkout, inside it in a wheel."""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(p) for p in (_here / "scripts", _here.parent) if (p / "train.py").is_file()]
