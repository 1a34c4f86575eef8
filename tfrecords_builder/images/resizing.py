"""Gray images to squares: several of one size at a time."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

# Bilinear (a triangle filter that Pillow widens when it shrinks, so antialiased) and not Lanczos, whose
# negative lobes ring beside ribs and devices, nor Box, which weighs source pixels unevenly when the ratio
# is not whole (299 to 224). It is also what `tf.image.resize(antialias=True)` computes.
RESAMPLING = Image.Resampling.BILINEAR
BANDS = 4
"""Images that are resized together."""
_MOST_PIXELS = 1 << 20
"""Of each of several images that are resized together: their memory stays bounded."""

Gray = npt.NDArray[np.uint8]


class Square(NamedTuple):
    """What an image is resized to."""

    side: int
    """In pixels."""
    reducing_gap: float | None = None
    """As Pillow's: shrink by a whole factor first, by means of squares of pixels, and leave at least so much more to
    interpolation."""


def squares(images: Sequence[Gray], wanted: Sequence[Square]) -> list[list[Gray]]:
    """Each of `images`, uint8 [height, width], in each of the `wanted` sizes: for each size, all images in order.

    Pillow resizes the four bands of a picture at once by vector instructions, but a gray image alone by scalar ones. As
    the bands of one picture, four gray images of one size take two thirds of the time, and their pixels are the same.
    """
    height, width = images[0].shape if images else (0, 0)
    if len(images) < BANDS or height * width > _MOST_PIXELS or any(image.shape != (height, width) for image in images):
        return [[_resized(image, square) for image in images] for square in wanted]
    if len(images) > BANDS:
        raise ValueError(f"{len(images)} images at a time; at most {BANDS}")
    picture: Image.Image | None = None
    found = []
    for square in wanted:
        if (height, width) == (square.side, square.side):
            found.append(list(images))
            continue
        if picture is None:
            picture = Image.merge("CMYK", [Image.fromarray(image) for image in images])
        found.append([_pixels(band) for band in _square(picture, square).split()])
    return found


def _resized(image: Gray, square: Square) -> Gray:
    if image.shape == (square.side, square.side):
        return image
    return _pixels(_square(Image.fromarray(image), square))


def _square(image: Image.Image, square: Square) -> Image.Image:
    return image.resize((square.side, square.side), RESAMPLING, reducing_gap=square.reducing_gap)


def _pixels(gray: Image.Image) -> Gray:
    """uint8 [height, width], read-only; half the time of `np.asarray`."""
    return np.frombuffer(gray.tobytes(), np.uint8).reshape(gray.height, gray.width)
