"""A run's folder: what says what the run is, its checkpoints, events, heartbeats, stop requests and versions.

Trains nothing and imports no TensorFlow.
"""
