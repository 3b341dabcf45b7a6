"""Text, tokens and batches: read documents, split and tokenize them, and read batches of tokens.

Read documents.py, split.py, tokenizer.py, prepare.py, shards.py and batches.py in this order.
"""
