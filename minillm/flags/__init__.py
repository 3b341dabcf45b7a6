"""Flags of each command, and the errors that can be found without torch.

Nothing here imports torch, so --help, --version and errors take a tenth of a second.
"""
