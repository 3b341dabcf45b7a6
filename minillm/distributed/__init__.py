"""Processes, and how a model is sharded over them (ZeRO stages 0 to 3).

Start with ranks.py, then strategies.py, which chooses between zero.py and fsdp.py.
"""
