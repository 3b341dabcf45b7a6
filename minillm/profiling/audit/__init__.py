"""Audit: machine code of the compiled kernels, read without a GPU.

Read audit.py first. cases.py lists what is compiled, dry.py compiles it, sass.py and ttir.py read
the code, and bound.py and occupancy.py compute what it allows.
"""
