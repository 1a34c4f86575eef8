"""The dataset on the disk: record, TFRecord framing, shards, manifest, TFDS metadata.

Owns every key and file name of a dataset. Decides nothing about which images it holds.
"""
