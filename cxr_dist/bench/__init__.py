"""Benchmarks, each a module with `measure` and `table`. Each compares with a baseline that is measured in the same run.

Trains only through the commands that it measures, and is used by no other package but the command line.
"""
