"""Page: results of `minillm profile` as files, text tables and an HTML page.

Read report.py first, then pivot.py, which puts rows side by side, and page.py.
"""
