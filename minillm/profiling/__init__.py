"""Measuring the kernels: static audit, timing, roofline. Nothing here is needed to train."""
