"""The bridge to train.py and sample.py: in a checkout above minillm/, in a wheel inside it."""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(p) for p in (_here / "scripts", _here.parent) if (p / "train.py").is_file()]
