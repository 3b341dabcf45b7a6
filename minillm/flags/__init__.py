"""The command lines: which flags each command takes, and what can be refused of them at once.

Nothing here imports torch, so help, versions and refusals take a tenth of a second.
"""
