"""Timing: the suites that measure, what they need, and the tuner of tiles.

Read suites.py first, then operations.py, the suite of single operations.
"""
