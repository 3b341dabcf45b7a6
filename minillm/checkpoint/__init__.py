"""A run folder, and the checkpoints in it: written whole, verified and read.

Start with run_folder.py, then write.py, read.py and find.py.
"""
