"""From gradients to a step: optimisers, learning rates, loss scaling. None of them knows a model.

Start with build.py, then schedule.py.
"""
