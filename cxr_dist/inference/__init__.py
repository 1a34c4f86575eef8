"""A finished run as a function of images: loading, prediction, Grad-CAM, export.

Writes nothing into a run.
"""
