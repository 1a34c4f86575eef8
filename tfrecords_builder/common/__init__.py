"""What the builder and the trainer share: errors, atomic files, locks, disk caches, object storage, the process pool,
HTML pages and figures.

Knows nothing of images, datasets or training.
"""
