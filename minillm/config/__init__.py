"""All settings of a model and of a run: default, limits, help text and flag of each, in one place.

Read fields.py (what a setting is), model.py and train.py (all of them), presets.py, flags.py
(settings as flags), config_files.py (--config), and resolve.py (which value wins) in this order.
"""
