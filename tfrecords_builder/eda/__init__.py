"""Exploratory analysis of a dataset: counts, figures, suspects, one HTML page.

Reads datasets and changes none.
"""
