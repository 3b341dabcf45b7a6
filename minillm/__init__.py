"""minillm: a compact decoder, its kernels, its trainer and its sampler."""

__version__ = "0.1.0"
