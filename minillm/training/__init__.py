"""From a batch to a finished run: setting up, steps, evaluation, recovery and reports.

Start with setup.py and state.py, then steps.py, recovery.py and metrics.py.
"""
