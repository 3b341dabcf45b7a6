"""From weights to text.

Start with generate.py, then text_stream.py, early_exit.py and speculative.py.
"""
