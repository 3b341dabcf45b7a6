"""From a batch to a finished run: setup, steps, evaluation, recovery and reports.

Read setup.py and state.py first (what is fixed, and what changes), then gradients.py, steps.py and
recovery.py, then build.py, snapshot.py and reporter.py. The story that uses them is train.py.
"""
