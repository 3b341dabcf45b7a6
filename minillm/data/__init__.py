"""From text to tokens to batches.

Read documents.py, split.py, tokenizer.py, prepare.py, shards.py and batches.py in this order.
"""
