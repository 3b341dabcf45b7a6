"""Every setting of a model and of a run, once: its default, its limits, its help and its flag.

Start with model.py and train.py; presets.py and resolve.py turn a command line into settings.
"""
