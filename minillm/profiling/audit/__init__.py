"""Static audit of the compiled kernels: registers, spills, instructions and bounds."""
