"""An HTTP service of a finished run on Ray Serve.

Trains nothing and changes no run.
"""
