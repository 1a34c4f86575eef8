"""Images as batches: readers of shards and folders, the order of images, the tf.data pipeline, augmentation.

Trains nothing.
"""
