"""How a dataset gets written: decoded parts, then shards, in a work folder that is renamed at the end.

Decides neither splits nor the record.
"""
