"""The decoder. It knows no ranks, no files, no text and no Triton.

Start with gpt.py and block.py, then attention.py, mlp.py, norms.py, linear.py, positions.py,
kv_cache.py and recurrence.py.
"""
