"""The decoder. It knows no ranks, no files, no text and no Triton.

Start with gpt.py, trunk.py and block.py. Then read their parts, attention.py, mlp.py, norms.py,
positions.py and linear.py, and what recurrent models add, injection.py and recurrence.py.
size.py counts parameters and FLOPs, and init.py draws the initial weights.
"""
