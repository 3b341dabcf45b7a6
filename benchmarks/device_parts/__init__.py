"""The parts of benchmarks/gpu.py, one module each, with a function `run(session)`.

Read session.py first, then environment.py, the shortest part. A new part also needs a line in PARTS
of benchmarks/gpu.py.
"""
