"""The configuration of a run or a search: its schema, and how presets, files and overrides make one.

Trains nothing and imports no TensorFlow.
"""
