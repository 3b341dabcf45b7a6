"""Run one part in this process; benchmarks/gpu.py starts it.

python -m benchmarks.device_parts attention --rows FILE --limit 75 --scratch DIR [--dry]
"""

import argparse
import importlib
import time
from pathlib import Path

from benchmarks.device_parts.session import SPARE_S, Session


def main() -> None:
    """Parse the flags and run the part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--worker", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    session = Session(
        part=args.part, rows=args.rows, end=time.monotonic() + args.limit - SPARE_S, dry=args.dry,
        scratch=args.scratch, worker=args.worker, workers=args.workers, first=args.first,
    )  # fmt: skip
    importlib.import_module(f"benchmarks.device_parts.{args.part}").run(session)


if __name__ == "__main__":
    main()
