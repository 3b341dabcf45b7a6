"""Readers of models in the formats of other projects. huginn.py reads Huginn-0125."""
