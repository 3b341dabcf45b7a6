"""What a training takes, before it runs: parameters, memory and time.

Start with estimate.py, then hardware.py and fit.py.
"""
