"""Which images go to training, validation and test: near-duplicates form groups, and a group goes into one split.

Pure: reads no file.
"""
