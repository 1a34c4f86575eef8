"""Devices, precision and tf.distribute strategies, and what workers do together.

The only place that makes a strategy. Knows nothing of stages or runs.
"""
