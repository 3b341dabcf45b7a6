"""Optimisers, learning rates, gradient clipping and loss scaling. They see parameters, not models.

Start with build.py, which lists the optimisers, then read recipe.py, adamw.py and schedule.py.
"""
