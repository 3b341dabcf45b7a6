"""Measure the kernels and the model: time, accuracy and the roofline."""
