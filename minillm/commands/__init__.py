"""Commands of `minillm VERB`, one per file. Each parses its flags, calls other wings and prints.

minillm/__main__.py selects the command.
"""
