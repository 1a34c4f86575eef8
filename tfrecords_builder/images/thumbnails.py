"""Thumbnails, by which images are compared."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tfrecords_builder.images import resizing
from tfrecords_builder.splitting.near_duplicates import THUMBNAIL_SIZE, Thumbnails

# Whole factors by means of squares, the rest by interpolation: a tenth of the time of interpolation alone.
THUMBNAIL = resizing.Square(THUMBNAIL_SIZE, reducing_gap=1.0)


def thumbnails_of(images: Sequence[npt.NDArray[np.uint8]]) -> Thumbnails:
    """Thumbnails uint8 [N, 64, 64] of gray images, each uint8 [height, width]."""
    made: list[npt.NDArray[np.uint8]] = []
    for start in range(0, len(images), resizing.BANDS):
        made += resizing.squares(images[start : start + resizing.BANDS], [THUMBNAIL])[0]
    return np.array(made, np.uint8).reshape(-1, THUMBNAIL_SIZE, THUMBNAIL_SIZE)
