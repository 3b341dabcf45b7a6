"""Files, devices, processes and terminals: what every wing stands on. Nothing here knows models.

Start with files.py (durable, hashed files), then program.py (errors to exit codes) and device.py.
"""
