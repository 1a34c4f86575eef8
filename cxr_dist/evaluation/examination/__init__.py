"""Whether a network relies on shortcuts: attention, occlusion, perturbations, sources, each with its statistics.

Reads a network and images. Changes neither.
"""
