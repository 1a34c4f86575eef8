"""Activations of frozen layers: computed once, kept on the disk within a bound, shared by epochs, trials and workers.

Trains nothing.
"""
