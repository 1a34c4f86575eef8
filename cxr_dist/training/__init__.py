"""The training loop over stages and epochs: step, gradients, optimizer, schedules, progress.

Knows nothing of Ray, of searches or of the command line.
"""
