"""Catalogue of the operations that the profiler measures, with one entry for each operation.

An entry has the sizes, the random data, the useful FLOPs and bytes, and the sizes at which tiles
are tuned. Read entry.py first, then mlp.py, the shortest of the files of entries. They are named
like those of kernels/reference/. problem.py lists all entries: a new operation is added there.
"""
