"""Processes of one launch, and strategies that shard a model over them.

Read ranks.py and strategies.py first, then zero.py, which stands on layout.py and buckets.py.
"""
