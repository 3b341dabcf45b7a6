"""Profiling: time, accuracy and machine code of the kernels and of whole models.

Nothing here is needed to train. Read catalogue/ first, which lists what is measured, then
timing/suites.py, which runs it, timing/operations.py, audit/audit.py and page/report.py.
"""
