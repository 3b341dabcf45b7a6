"""Processes of one launch, and how a model is sharded over them.

Read ranks.py and strategies.py first, then zero.py, which stands on layout.py and buckets.py.
"""
