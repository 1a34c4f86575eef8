"""Where a training or a search runs: this process, or a Ray cluster; and commands as Ray jobs.

With `serving`, the only package that imports Ray.
"""
