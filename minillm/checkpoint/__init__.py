"""A run folder and the checkpoints in it, which are written whole, verified and read.

Read run_folder.py first, then write.py, read.py and find.py.
"""
