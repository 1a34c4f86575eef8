"""What the builder and the trainer share: errors, atomic files, locks, sealed files, the process pool, HTML pages.

Knows nothing of images, datasets or training.
"""
