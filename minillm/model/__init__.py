"""The decoder. It knows no ranks, no files, no text and no Triton.

Start with gpt.py, then layers.py, positions.py, kv_cache.py and recurrence.py.
"""
