"""Estimates of a training run before it starts: parameters, memory and time.

Start with job.py and estimate.py, then hardware.py and fit.py.
"""
