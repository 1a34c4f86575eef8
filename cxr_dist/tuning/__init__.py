"""A search over configurations: search space, sampler, trials, the experiment's folder and page.

Knows nothing of Ray.
"""
