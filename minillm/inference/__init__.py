"""From weights to text, and from text to its probability.

Start with language_model.py and complete.py, which take texts. Then read generate.py, which takes
token ids, with decoding_batch.py, draw.py and text_stream.py. early_exit.py and speculative.py make
recurrent models faster; score.py measures texts.
"""
