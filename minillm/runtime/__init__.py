"""Files, devices, processes and terminals, for all other wings. Nothing here knows models.

Read files.py (durable files with digests), program.py (errors become exit codes), cli.py (command
lines), launch.py (ranks and start commands) and device.py in this order.
"""
